"""metrics.jsonl: one line of JSON for each logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    # What stands after the last line break was never finished.
    return [json.loads(line) for line in lines[:-1] if line]
