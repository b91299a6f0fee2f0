"""Runs beside each other: one self-contained page, and its table as CSV and Markdown."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from shards import even_spread, replace_atomically
from train.report.finished_runs import Run, differing_settings

_MOST_POINTS = 200
"""Points of a curve; a hundred runs then make a page of a few megabytes."""
_MOST_SHEETS = 24
"""Runs whose sample sheets are shown."""
_AXES = ("steps", "images", "hours", "FLOPs")
_SHOWN = frozenset(
    {"loss", "l1", "psnr", "lpips", "fid", "gradient_norm", "learning_rate", "images_per_second"}
)
"""Metrics named first in the list of curves."""


def write_comparison(runs: Sequence[Run], out: Path, notes: Sequence[str]) -> None:
    """Write the page, and beside it the table as .csv and .md.

    Args:
        runs: The runs, at least one.
        out: The page, an .html file.
        notes: What to tell about runs and results that are not shown.
    """
    header, rows = comparison_table(runs)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([header, *rows])
    replace_atomically(out.with_suffix(".csv"), buffer.getvalue().encode())
    replace_atomically(out.with_suffix(".md"), _markdown(header, rows).encode())
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    data = {
        "metrics": _metric_names(runs),
        "axes": list(_AXES),
        "runs": [_plotted(run, colour(index, len(runs))) for index, run in enumerate(runs)],
    }
    page = template.substitute(
        title=html.escape(f"{len(runs)} runs"),
        notes="<br>".join(map(html.escape, notes)),
        table=_table(header, rows, len(runs)),
        sheets=_sheets(runs),
        data=json.dumps(data).replace("</", "<\\/"),
    )
    replace_atomically(out, page.encode())


def colour(index: int, count: int) -> str:
    """Return a colour of its own for each of some runs, neighbours far apart."""
    turn = 360 / max(count, 1)
    return f"hsl({round(210 + index * (137.508 if count > 12 else turn)) % 360} 65% {42 - 12 * (index % 2)}%)"


def comparison_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: name, what it varies, where settings differ, progress, last values and scores."""
    settings = differing_settings(runs)
    scores = list(
        dict.fromkeys(f"{name}: {m}" for run in runs for name, found in run.scores.items() for m in found)
    )
    header = ["run", *(["varies"] if any(run.varies for run in runs) else []), *settings]
    header += ["step", "images", "hours", "FLOPs", "loss", *scores]
    rows = []
    for run in runs:
        step, images, hours, flops = (run.progress() or [(run.steps, 0.0, 0.0, 0.0)])[-1]
        loss = run.curve("loss")
        row = [run.name, *([run.varies or ""] if "varies" in header else [])]
        row += [_shown(run.settings.get(name, "")) for name in settings]
        row += [f"{step}", f"{images:.0f}", f"{hours:.2f}", f"{flops:.2e}" if run.flops else ""]
        row += [f"{loss[-1][1]:.5g}" if loss else ""]
        values = {f"{name}: {m}": v for name, found in run.scores.items() for m, v in found.items()}
        row += [f"{values[name]:.5g}" if name in values else "" for name in scores]
        rows.append(row)
    return header, rows


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *header))
    body = "".join(
        f'<tr data-run="{index}"><td><span class="swatch" style="background:{colour(index, count)}"></span></td>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _metric_names(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(
        name for run in runs for line in run.metrics for name, v in line.items() if v is not None
    )
    curves = [name for name in names if name not in ("step", "samples_seen", "step_seconds")]
    return sorted(curves, key=lambda name: (name not in _SHOWN, curves.index(name)))


def _plotted(run: Run, line_colour: str) -> dict[str, Any]:
    """Return what the page's script needs of a run: curves as (index, value), and the axes' values at each index."""
    progress = run.progress()
    steps = sorted({line["step"] for line in run.metrics})
    index_of = {step: index for index, step in enumerate(steps)}
    axes: dict[str, list[float | None]] = {"steps": [float(step) for step in steps]}
    at = 0
    columns: list[tuple[float, float, float] | None] = []
    for step in steps:
        while at < len(progress) and progress[at][0] < step:
            at += 1
        columns.append(progress[min(at, len(progress) - 1)][1:] if progress else None)
    for number, name in enumerate(_AXES[1:]):
        axes[name] = [
            None if c is None or (name == "FLOPs" and not run.flops) else c[number] for c in columns
        ]
    curves = {}
    for name in _metric_names([run]):
        points = run.curve(name)
        kept = (
            points
            if len(points) <= _MOST_POINTS
            else [points[i] for i in even_spread(_MOST_POINTS, len(points))]
        )
        curves[name] = [(index_of[int(step)], value) for step, value in kept]
    return {"name": run.name, "colour": line_colour, "axes": axes, "curves": curves}


def _sheets(runs: Sequence[Run]) -> str:
    """Return the newest sample sheet of each run, drawn from the same noise in all of them."""
    figures = []
    for run in [run for run in runs if run.samples][:_MOST_SHEETS]:
        step = max(run.samples)
        image = base64.b64encode(run.samples[step].read_bytes()).decode()
        figures.append(
            f'<figure><img alt="samples of {html.escape(run.name)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{html.escape(run.name)}, step {step:,}</figcaption></figure>"
        )
    return f'<h2>Samples</h2><div class="sheets">{"".join(figures)}</div>' if figures else ""
