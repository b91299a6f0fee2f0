"""metrics.jsonl: one line of JSON for each logged step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards import UserError, read_document


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
        UserError: another line is not one of metrics.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    # What stands after the last line break was never finished.
    return [_metrics(line, f"line {number} of {path}") for number, line in enumerate(lines[:-1], 1) if line]


def _metrics(line: bytes, name: str) -> dict[str, Any]:
    found = read_document(line, dict[str, int | float | None], name=name, remedy="remove the line")
    if not isinstance(found.get("step"), int):
        raise UserError(f"{name} has no step; remove the line")
    return found
