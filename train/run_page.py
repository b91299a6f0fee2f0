"""RUN/index.html: curves, pictures over time, settings and recipe of a run, in one file that needs no other."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from shards.atomic import replace_atomically
from train.metrics_file import read_metrics

_PANELS = (
    ("loss", ("loss",)),
    ("loss by time", ("loss_t",)),
    ("picture quality", ("psnr", "ssim", "lpips")),
    ("FID of a few samples", ("fid",)),
    ("adversary", ("adaptive_weight", "discriminator_accuracy", "discriminator_loss", "adversarial")),
    ("gradient norm", ("gradient_norm",)),
    ("learning rate", ("learning_rate",)),
    ("images a second", ("images_per_second",)),
    ("share of time waiting for data", ("data_wait",)),
)
"""Panels of curves: title, and how the names of the metrics in it begin; "loss" alone is the whole loss."""

_SIZE = (500, 200)
"""Width and height of a panel."""

_Thing = TypeVar("_Thing")

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%} table{border-collapse:collapse} td{padding:2px 12px 2px 0;vertical-align:top}
.curves{display:grid;grid-template-columns:1fr 1fr} figure{margin:8px} svg{background:#fafafa;width:100%}
figcaption{color:#666;font-size:12px}
pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def write_run_page(out: Path, *, title: str, facts: Sequence[str]) -> None:
    """Write the page from what lies in a run's directory.

    Args:
        out: the run's directory, with metrics.jsonl, config.json and samples/.
        title: heading.
        facts: lines about network, store and cost.
    """
    metrics = read_metrics(out / "metrics.jsonl")
    samples = "".join(
        f'<figure><img alt="{path.stem}" src="{_embedded(path.read_bytes())}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in _spread(sorted((out / "samples").glob("*.png")), 6)
    )
    settings = html.escape((out / "config.json").read_text())
    last = json.dumps(metrics[-1], indent=1) if metrics else "nothing yet"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in facts)
        + f"<h2>Curves</h2>{_curves(metrics)}"
        + (f"<h2>Pictures over time</h2>{samples}" if samples else "")
        + f"<h2>Last line of metrics.jsonl</h2><pre>{html.escape(last)}</pre>"
        + f"<h2>Settings</h2><pre>{settings}</pre></html>\n"
    )
    replace_atomically(out / "index.html", page.encode())


def _curves(metrics: list[dict[str, Any]]) -> str:
    """A panel for each group of metrics there is anything of, as SVG: drawn in a millisecond while training waits."""
    names = list(dict.fromkeys(name for line in metrics for name in line))
    panels = []
    for title, beginnings in _PANELS:
        own = [n for n in names if n in beginnings or (title != "loss" and n.startswith(beginnings))]
        series = {
            name: [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            for name in own
        }
        if any(series.values()):
            panels.append(_panel(title, {name: points for name, points in series.items() if points}))
    return f'<div class="curves">{"".join(panels)}</div>'


def _panel(title: str, series: dict[str, list[tuple[int, float]]]) -> str:
    """One panel: a line a metric, the ranges of both axes, and the names in the lines' colours."""
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    across, up = _SIZE[0] / max(right - left, 1), _SIZE[1] / ((high - low) or 1.0)
    lines, legend = [], []
    for index, (name, points) in enumerate(series.items()):
        colour = f"hsl({(210 + 67 * index) % 360} 65% 42%)"
        places = " ".join(
            f"{(step - left) * across:.1f},{_SIZE[1] - (value - low) * up:.1f}"
            for step, value in _spread(points, 500)
        )
        lines.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        legend.append(f'<span style="color:{colour}">{html.escape(name)} {points[-1][1]:.4g}</span>')
    return (
        f"<figure><b>{html.escape(title)}</b> <small>{low:.4g} to {high:.4g}</small>"
        f'<svg viewBox="-4 -4 {_SIZE[0] + 8} {_SIZE[1] + 8}">{"".join(lines)}</svg>'
        f"<figcaption>steps {left:,} to {right:,}; last: {', '.join(legend)}</figcaption></figure>"
    )


def _spread(things: list[_Thing], count: int) -> list[_Thing]:
    """At most `count` of the things, evenly spread, the first and the last among them."""
    if len(things) <= count:
        return things
    return [things[round(i * (len(things) - 1) / (count - 1))] for i in range(count)]


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
