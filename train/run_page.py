"""RUN/index.html: curves, pictures over time, settings and recipe of a run, in one file that needs no other."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.atomic import replace_atomically
from train.metrics_file import read_metrics

_PANELS = (
    ("loss", ("loss",)),
    ("loss by time", ("loss_t",)),
    ("picture quality", ("psnr", "ssim", "lpips")),
    ("adversary", ("adaptive_weight", "discriminator_accuracy", "discriminator_loss", "adversarial")),
    ("gradient norm", ("gradient_norm",)),
    ("learning rate", ("learning_rate",)),
    ("images a second", ("images_per_second",)),
    ("share of time waiting for data", ("data_wait",)),
)
"""Panels of curves: title, and how the names of the metrics in it begin; "loss" alone is the whole loss."""

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%} table{border-collapse:collapse} td{padding:2px 12px 2px 0;vertical-align:top}
figcaption{color:#666}
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
    """One picture of a panel for each group of metrics there is anything of."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for line in metrics for name in line))
    panels = []
    for title, beginnings in _PANELS:
        own = [n for n in names if n in beginnings or (title != "loss" and n.startswith(beginnings))]
        if own:
            panels.append((title, own))
    if not panels:
        return ""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3 * rows))
    figure.subplots_adjust(left=0.06, right=0.98, top=1 - 0.1 / rows, bottom=0.14 / rows, hspace=0.45)
    for place, (title, own) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, place + 1)
        for name in own:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(own) > 1:
            axes.legend(fontsize=6, ncols=2)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return f'<img alt="curves" src="{_embedded(file.getvalue())}">'


def _spread(paths: list[Path], count: int) -> list[Path]:
    """At most `count` of the paths, evenly spread, the first and the last among them."""
    if len(paths) <= count:
        return paths
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
