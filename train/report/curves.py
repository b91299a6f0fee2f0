"""Curves of a run's metrics as SVG: rendered in a millisecond while training waits, without another file."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shards import even_spread


class Panel(NamedTuple):
    """A figure, and which metrics are plotted in it."""

    title: str
    shows: Callable[[str], bool]
    """Whether a metric of this name belongs to it."""
    log: bool = False
    """Whether the axis is logarithmic where values are far apart."""


def _named(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


PANELS = (
    Panel("loss", _named("loss", "l1")),
    Panel("loss by time t", lambda name: name.startswith("loss_t")),
    Panel("squared error by time t", lambda name: name.startswith("error_t"), log=True),
    Panel("squared error by length of the jump, t − r", lambda name: name.startswith("error_gap"), log=True),
    Panel("RMS of the velocity and of du/dt", _named("velocity_rms", "derivative_rms"), log=True),
    Panel("PSNR, dB", _named("psnr", "held_out_psnr")),
    Panel("SSIM", _named("held_out_ssim")),
    Panel("LPIPS", _named("lpips", "held_out_lpips")),
    Panel("FID of a few samples", _named("fid"), log=True),
    Panel("adversarial losses", _named("adversarial", "discriminator_loss")),
    Panel("share of the discriminator's verdicts that are right", _named("discriminator_accuracy")),
    Panel("λ, weight of the adversarial loss", _named("adaptive_weight"), log=True),
    Panel("norm of the gradient", _named("gradient_norm"), log=True),
    Panel("learning rate", _named("learning_rate")),
    Panel("images a second", _named("images_per_second")),
    Panel("share of time spent waiting for data", _named("data_wait")),
)

_WIDTH, _HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 508, 8, 196
"""Edges of the plotted area within a panel."""
_LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""
_MOST_POINTS, _MARKED_POINTS = 500, 40


class Axis(NamedTuple):
    """From values to positions between two edges."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def position(self, value: float) -> float:
        """Return where a value is."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to name, 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            digits = (1, 2, 5) if last - first <= 2 else (1,)
            every = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
            return [value for value in every if self.low <= value <= self.high]
        if self.low == self.high:
            return [self.low]
        least = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(least))
        step = power * next(digit for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def render_curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Return a figure for each panel there are numbers for, as HTML.

    Args:
        metrics: lines of metrics.jsonl.
    """
    names = list(dict.fromkeys(name for line in metrics for name in line))
    figures = []
    for panel in PANELS:
        series = {name: _points(metrics, name) for name in names if panel.shows(name)}
        if any(series.values()):
            figures.append(_figure(panel, {name: points for name, points in series.items() if points}))
    return f'<div class="curves">{"".join(figures)}</div>'


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def _figure(panel: Panel, series: dict[str, list[tuple[int, float]]]) -> str:
    """Return one panel: axes with round numbers, a line a metric, and their names with the last values."""
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    log = panel.log and low > 0 and high / low > _LOG_FROM
    across = Axis(min(steps), max(steps), _LEFT, _RIGHT)
    up = Axis(low, high, _BOTTOM, _TOP, log=log)
    lines, legend = [], []
    for index, (name, points) in enumerate(series.items()):
        colour = f"hsl({(210 + 67 * index) % 360} 65% 42%)"
        shown = [points[i] for i in even_spread(_MOST_POINTS, len(points))]
        positions = [(across.position(step), up.position(value)) for step, value in shown]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
        lines.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(positions) <= _MARKED_POINTS:
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in positions]
        legend.append(f'<span style="color:{colour}">{html.escape(name)} {points[-1][1]:.4g}</span>')
    return (
        f"<figure><b>{panel.title}</b>{' <small>logarithmic</small>' if log else ''}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{panel.title}">'
        f"{_grid(across, up)}{''.join(lines)}</svg>"
        f"<figcaption>last: {', '.join(legend)}</figcaption></figure>"
    )


def _grid(across: Axis, up: Axis) -> str:
    """Return lines at round numbers, and the numbers."""
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_RIGHT - _LEFT}" height="{_BOTTOM - _TOP}" class="area"/>'
    ]
    for tick in up.ticks():
        y = f"{up.position(tick):.1f}"
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end" dy="0.35em">{tick:.4g}</text>')
    for tick in across.ticks():
        if tick == round(tick):
            x = f"{across.position(tick):.1f}"
            parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}" class="grid"/>')
            parts.append(f'<text x="{x}" y="{_BOTTOM + 14}" text-anchor="middle">{_brief(tick)}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{_HEIGHT - 5}" text-anchor="end">step</text>')
    return "".join(parts)


def _brief(step: float) -> str:
    """Return a step as it is read at a glance: 1500, 20k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if step >= size:
            return f"{step / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{step:g}"
