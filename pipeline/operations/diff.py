"""`pipeline diff`: in what two stores differ, as text or JSON; exit code 0 if in nothing, 1 otherwise."""

import json
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.console import show
from pipeline.operations.difference import FieldDifference, NumberDifference, StoreDifference, compare_stores
from pipeline.settings.operations import DiffConfig
from shards import UsageError, open_store

_NAMED_AT_MOST = 5
_ROW_LINES = {
    "only_a": "only in the first",
    "only_b": "only in the second",
    "other_class": "of another class",
    "valid_only_a": "usable only in the first",
    "valid_only_b": "usable only in the second",
}


def diff(config: DiffConfig) -> int:
    """Print in what two stores differ; returns 1 if they do, else 0.

    Raises:
        UserError: If one of them is no finished store, or damaged.
    """
    if config.rows < 0:
        raise UsageError(f"--rows must be a number of rows, or 0 for all, got {config.rows}")
    a, b = (open_store(path, follow_links=config.follow_links) for path in (config.a, config.b))
    with tqdm(unit="row", desc="compare", file=sys.stderr, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        difference = compare_stores(a, b, rows=config.rows or None, progress=advance)
    facts = difference_facts(difference)
    show(json.dumps(facts, indent=1, ensure_ascii=False) if config.json else _as_text(difference))
    return 0 if difference.same else 1


def difference_facts(difference: StoreDifference) -> dict[str, Any]:
    """Return everything, as plain JSON values; of first and second store in this order."""
    return {
        "same": difference.same,
        "recipe": difference.recipe,
        "added_fields": difference.added,
        "statistics": difference.statistics,
        "rows": {"common": difference.rows.common, **difference.rows.lists()},
        "bytes": difference.nbytes,
        "fields": {path: _field_facts(part) for path, part in difference.fields.items()},
    }


def _field_facts(part: FieldDifference) -> dict[str, Any]:
    facts: dict[str, Any] = {"rows": part.rows, "differing": part.differing, "shapes": part.shapes}
    if part.numbers is not None:
        facts |= {
            "compared": part.numbers.compared,
            "largest": part.numbers.largest.tolist(),
            "mean": part.numbers.mean.tolist(),
            "deviation": part.numbers.std.tolist(),
        }
    return facts


def _as_text(difference: StoreDifference) -> str:
    lines = [f"recipe     {line}" for line in difference.recipe] or ["recipe     the same"]
    lines += [f"field      {line}" for line in difference.added]
    if difference.statistics is not None:
        lines.append("statistics from {} and from {}".format(*difference.statistics))
    lines.append(f"rows       {difference.rows.common} images are in both")
    lines += [
        f"           {len(keys)} {_ROW_LINES[name]}: {', '.join(keys[:_NAMED_AT_MOST])}"
        + (" …" if len(keys) > _NAMED_AT_MOST else "")
        for name, keys in difference.rows.lists().items()
        if keys
    ]
    lines += [
        f"bytes      {name} {one:,}" + ("" if one == other else f" and {other:,}")
        for name, (one, other) in difference.nbytes.items()
    ]
    for path, part in difference.fields.items():
        lines += [f"{path:<10} {line}" for line in _field_lines(part)]
    return "\n".join([*lines, "the stores are the same" if difference.same else "the stores differ"])


def _field_lines(part: FieldDifference) -> list[str]:
    if part.shapes is not None:
        shapes = " and ".join("×".join(map(str, shape)) for shape in part.shapes)
        return [f"rows of different shapes: {shapes}"]
    lines = [f"{part.differing} of {part.rows} rows differ"]
    return lines if part.numbers is None else [*lines, *_number_lines(part.numbers)]


def _number_lines(numbers: NumberDifference) -> list[str]:
    lines = [f"{numbers.compared} of them read: {numbers.mean.mean():.4g} on average"]
    for what, values in (("largest", numbers.largest), ("mean", numbers.mean)):
        channel = int(np.argmax(values))
        lines.append(
            f"{what} difference {values[channel]:.4g}, in channel {channel} of standard deviation "
            f"{numbers.std[channel]:.4g}"
        )
    return lines
