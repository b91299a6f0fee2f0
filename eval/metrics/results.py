"""`results.json`, and a Markdown table with our row beside the published ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.protocols import PublishedRow
from shards import replace_atomically

_HEADER = ("model", "FID", "IS", "precision", "recall", "source")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    replace_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def device_name(device: torch.device) -> str:
    """Return the device in words: a GPU's product name, or `cpu` with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that can move the last digits."""
    return {name: version(name) for name in ("torch", "numpy", "pillow")}


def markdown_table(
    published: Sequence[PublishedRow], model: str, metrics: Mapping[str, float], source: str
) -> str:
    """Return the published rows and ours in one table, ours last; a dash where a number is not known."""
    ours = (
        f"**{model}**",
        _number(metrics.get("fid"), 2),
        _number(metrics.get("is"), 1),
        _number(metrics.get("precision"), 2),
        _number(metrics.get("recall"), 2),
        source,
    )
    rows = [
        (
            row.model,
            _number(row.fid, 2),
            _number(row.inception_score, 1),
            _number(row.precision, 2),
            _number(row.recall, 2),
            row.source,
        )
        for row in published
    ]
    lines = [_HEADER, ("---", "---:", "---:", "---:", "---:", "---"), *rows, ours]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
