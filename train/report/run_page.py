"""RUN/index.html: curves, images over time, settings and recipe of a run, in one file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards import even_spread, replace_atomically
from train.report.curves import render_curves
from train.report.finished_runs import sample_sheets
from train.report.metrics_file import read_metrics
from train.settings.saved_settings import flat_values, load_settings, trainer_of

_MOST_IMAGES = 6

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{font-weight:600} h2{margin-top:1.6em} img{max-width:100%}
table{border-collapse:collapse;font-size:13px} td{padding:1px 14px 1px 0;vertical-align:top}
td+td{font-variant-numeric:tabular-nums} .beside{columns:2 420px}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr))} figure{margin:10px}
svg{width:100%;display:block} svg text{font-size:11px;fill:#666} .grid{stroke:#e4e4e4} .area{fill:#fafafa;stroke:#ccc}
.images{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr))}
figcaption,small{color:#666;font-size:12px} code{background:#f3f3f3;padding:2px 5px}"""


def write_run_page(out: Path, *, title: str, facts: Sequence[str]) -> None:
    """Write the page from what is in a run's directory.

    Args:
        out: the run's directory, with metrics.jsonl, config.json and samples/.
        title: heading.
        facts: lines about network, store and cost.
    """
    metrics = read_metrics(out / "metrics.jsonl")
    last = {name: value for line in metrics for name, value in line.items()}
    found = list(sample_sheets(out).items())
    images = dict(found[i] for i in even_spread(_MOST_IMAGES, len(found)))
    sections = {
        f"Curves to step {last.get('step', 0):,}": render_curves(metrics),
        "Images over time": _images(images),
        "Last values": f'<div class="beside">{_table(last.items())}</div>' if last else "",
        "Settings": _settings(out / "config.json"),
    }
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in facts)
        + "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections.items() if content)
        + "</html>\n"
    )
    replace_atomically(out / "index.html", page.encode())


def _settings(path: Path) -> str:
    settings = load_settings(path)
    command = html.escape(f"accelerate launch train/{trainer_of(settings)}.py {path} --out ANOTHER")
    table = _table(flat_values(settings).items())
    return f'<p>To repeat the run: <code>{command}</code></p><div class="beside">{table}</div>'


def _images(sheets: Mapping[int, Path]) -> str:
    figures = [
        f'<figure><img alt="{html.escape(path.stem)}" src="{_embedded(path.read_bytes())}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
        for step, path in sheets.items()
    ]
    return f'<div class="images">{"".join(figures)}</div>' if figures else ""


def _table(values: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>"
        f"{html.escape(f'{value:.6g}' if isinstance(value, float) else str(value))}</td></tr>"
        for name, value in values
    )
    return f"<table>{rows}</table>"


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
