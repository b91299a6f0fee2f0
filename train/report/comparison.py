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
from train.report.finished_runs import Run, differing_settings, in_families

_MOST_POINTS = 200
"""Points of a curve; a hundred runs then make a page of a few megabytes."""
_LONG = 40
"""Characters from which a cell of the table is cut short, and shown whole when it is pointed at."""
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
    families = in_families(runs)
    runs = [run for run, _, _ in families]
    header, rows = comparison_table(runs)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([header, *rows])
    replace_atomically(out.with_suffix(".csv"), buffer.getvalue().encode())
    replace_atomically(out.with_suffix(".md"), _markdown(header, rows).encode())
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    settings = differing_settings(runs)
    data = {
        "metrics": _metric_names(runs),
        "axes": list(_AXES),
        "settings": settings,
        "runs": [_plotted(run, settings) for run in runs],
    }
    page = template.substitute(
        title=html.escape(f"{len(runs)} runs"),
        notes="<br>".join(map(html.escape, notes)),
        table=_table(header, rows, [depth for _, _, depth in families]),
        sheets=_sheets(runs),
        data=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
    )
    replace_atomically(out, page.encode())


def comparison_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: name, what it varies, where settings differ, progress, last values and scores.

    A run stands behind the one that it varies.
    """
    settings = differing_settings(runs)
    scores = list(
        dict.fromkeys(f"{name}: {m}" for run in runs for name, found in run.scores.items() for m in found)
    )
    header = ["run", *(["varies"] if any(run.varies for run in runs) else []), *settings]
    header += ["step", "images", "hours", "FLOPs", "loss", *scores]
    rows = []
    for run, parent, _ in in_families(runs):
        step, images, hours, flops = (run.progress() or [(run.steps, 0.0, 0.0, 0.0)])[-1]
        loss = run.curve("loss")
        row = [run.name, *([_origin(run, parent)] if "varies" in header else [])]
        row += [_shown(run.settings.get(name, "")) for name in settings]
        row += [f"{step}", f"{images:.0f}", f"{hours:.2f}", f"{flops:.2e}" if run.flops else ""]
        row += [f"{loss[-1][1]:.5g}" if loss else ""]
        values = {f"{name}: {m}": v for name, found in run.scores.items() for m, v in found.items()}
        row += [f"{values[name]:.5g}" if name in values else "" for name in scores]
        rows.append(row)
    return header, rows


def _origin(run: Run, parent: Run | None) -> str:
    """Say which run a run varies, and in what."""
    if run.varies is None:
        return ""
    name = str(Path(run.varies).parent) if parent is None else parent.name
    return f"{name} ({'; '.join(run.varies_in)})" if run.varies_in else name


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], depths: Sequence[int]) -> str:
    """Return the table; the name of a run is set in by how many runs are above it in its family."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for index, (row, depth) in enumerate(zip(rows, depths, strict=True)):
        name, *cells = map(html.escape, row)
        mark = f'<td style="--depth:{depth}"><i class="swatch"></i>{name}</td>'
        rest = "".join(
            f'<td title="{cell}">{cell}</td>' if len(cell) > _LONG else f"<td>{cell}</td>" for cell in cells
        )
        body.append(f'<tr data-run="{index}">{mark}{rest}</tr>')
    return f'<table class="tree"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _metric_names(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(
        name for run in runs for line in run.metrics for name, v in line.items() if v is not None
    )
    curves = [name for name in names if name not in ("step", "samples_seen", "step_seconds")]
    return sorted(curves, key=lambda name: (name not in _SHOWN, curves.index(name)))


def _plotted(run: Run, settings: Sequence[str]) -> dict[str, Any]:
    """Return what the page's script needs of a run: settings, curves as (index, value), and the axes at each index."""
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
            None if c is None or (name == "FLOPs" and not run.flops) else _short(c[number]) for c in columns
        ]
    curves = {}
    for name in _metric_names([run]):
        points = run.curve(name)
        kept = (
            points
            if len(points) <= _MOST_POINTS
            else [points[i] for i in even_spread(_MOST_POINTS, len(points))]
        )
        curves[name] = [(index_of[int(step)], _short(value)) for step, value in kept]
    own = {name: run.settings.get(name, "") for name in settings}
    return {"name": run.name, "settings": own, "axes": axes, "curves": curves}


def _short(value: float) -> float:
    """Round a number to the six digits that a curve can show, so that a page of a hundred runs stays small."""
    return float(f"{value:.6g}")


def _sheets(runs: Sequence[Run]) -> str:
    """Return the newest sample sheet of each run, drawn from the same noise in all of them."""
    having = [(index, run) for index, run in enumerate(runs) if run.samples]
    figures = []
    for index, run in [having[place] for place in even_spread(_MOST_SHEETS, len(having))]:
        step = max(run.samples)
        image = base64.b64encode(run.samples[step].read_bytes()).decode()
        figures.append(
            f'<figure data-run="{index}"><img alt="samples of {html.escape(run.name)}" src="data:image/png;base64,'
            f'{image}"><figcaption>{html.escape(run.name)}, step {step:,}</figcaption></figure>'
        )
    if not figures:
        return ""
    left_out = len(having) - len(figures)
    note = (
        f'<p class="note">Of {left_out} more runs none are shown; compare fewer to see theirs.</p>'
        if left_out
        else ""
    )
    return f'<h2>Samples</h2>{note}<div class="sheets">{"".join(figures)}</div>'
