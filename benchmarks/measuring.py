"""What the benchmarks of the store share: data, ratios measured side by side, and a table of goals."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import (
    EncoderIdentity,
    Plan,
    Recipe,
    SourceRecord,
    Store,
    StoreIncompleteError,
    StoreWriter,
    UsageError,
    open_store,
)
from shards.values.quantize import fit_code

GRID = (16, 16)
WIDTH = 768


@dataclass
class Result:
    """One line of the table.

    Attributes:
        what: What was measured.
        against: What it is compared with.
        goal: Ratio to reach; None where the line is for information.
        ours: Our speed, a round an entry.
        theirs: The other's speed in the same rounds.
        unit: Of both speeds.
    """

    what: str
    against: str
    goal: float | None
    ours: list[float]
    theirs: list[float]
    unit: str = "rows/s"

    @property
    def ratio(self) -> float:
        """Median over rounds of ours / theirs, so that what slows both does not count."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def line(self) -> str:
        """Format as a line of a Markdown table."""
        rounds = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        verdict = "" if self.goal is None else ("yes" if self.ratio >= self.goal else "no")
        return (
            f"| {self.what} | {self.against} | {statistics.median(self.ours):.0f} | "
            f"{statistics.median(self.theirs):.0f} {self.unit} | {self.ratio:.2f} "
            f"({min(rounds):.2f}–{max(rounds):.2f}) | {'' if self.goal is None else self.goal} | {verdict} |"
        )


HEADER = "| what | against | ours | theirs | ratio (rounds) | goal | reached |\n|---|---|---|---|---|---|---|"


def side_by_side(
    ours: Callable[[], int], theirs: Callable[[], int], *, rounds: int, slices: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Rates of two functions, measured in turns.

    A round alternates short slices of both, so that other work on the machine meets both alike.

    Args:
        ours: Handles some rows and returns how many.
        theirs: The same, the other way.
        rounds: Rates to give for each.
        slices: Turns of each in a round.
        seconds: Length of a slice.
    """
    ours()
    theirs()
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        counts, times = [0, 0], [0.0, 0.0]
        for turn in range(slices):
            for which in (0, 1) if turn % 2 else (1, 0):
                begun = time.perf_counter()
                while (elapsed := time.perf_counter() - begun) < seconds:
                    counts[which] += (ours, theirs)[which]()
                times[which] += elapsed
        for which in (0, 1):
            rates[which].append(counts[which] / times[which])
    return rates


def make_tokens(path: Path, num_rows: int) -> np.ndarray:
    """Return a flat npy file of float16 rows [256, 768], made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        rows = np.lib.format.open_memmap(partial, "w+", np.float16, (num_rows, GRID[0] * GRID[1], WIDTH))
        generator = np.random.default_rng(0)
        for index in range(num_rows):
            rows[index] = generator.standard_normal(rows.shape[1:], np.float32)
        rows.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def benchmark_recipe(plan: Plan, **settings: Any) -> Recipe:
    """Return a recipe for rows [256, 768] without images."""
    encoder = EncoderIdentity(
        name="benchmark",
        weights="random:0",
        weights_digest="0" * 64,
        preprocessing={},
        input_size=224,
        grid=GRID,
        width=WIDTH,
        prefix_tokens=5,
        final_norm="layernorm-no-affine",
    )
    return Recipe(
        encoder=encoder,
        **plan.recipe_values(),
        image_size=0,
        **{"views": ("center",), **settings},
    )


def benchmark_plan(num_rows: int, num_shards: int) -> Plan:
    """Return a plan of images that do not exist."""
    records = [
        SourceRecord(f"{i % 1000:04d}/{i:08d}.jpg", i % 1000, f"/none/{i}", 0, 1) for i in range(num_rows)
    ]
    return Plan.build(records, [f"class {i}" for i in range(1000)], num_shards, 0)


def make_store(path: Path, tokens: np.ndarray, num_shards: int, **settings: Any) -> Store:
    """Return a store of the rows, row by row those of the flat file; made once."""
    try:
        return open_store(path)
    except (UsageError, StoreIncompleteError):
        pass
    plan = benchmark_plan(len(tokens), num_shards)
    code = None
    if settings.get("dtype") == "int8":
        code = fit_code(np.asarray(tokens[:: max(1, len(tokens) // 64)]).reshape(-1, WIDTH))
    writer = StoreWriter.create_or_continue(path, benchmark_recipe(plan, **settings), plan, code)
    for view, shard in writer.pending():
        rows = plan.rows_of(shard)
        with writer.shard(view, shard) as output:
            for first in range(0, len(rows), 16):
                block = np.asarray(tokens[rows.start + first : min(rows.start + first + 16, rows.stop)])
                if code is not None:
                    block, square_errors = code.encode_rows(block.astype(np.float32))
                    for square_error in square_errors:
                        output.add_square_error(square_error)
                output.write_block(first, {"tokens": block})
            output.publish()
    writer.finalize()
    return open_store(path)


def make_small_store(path: Path, num_rows: int, shape: tuple[int, int], num_shards: int) -> Store:
    """Return a store of random float16 rows [N, D] in the views center and flip, such as compact latents; made once."""
    try:
        return open_store(path)
    except (UsageError, StoreIncompleteError):
        pass
    plan = benchmark_plan(num_rows, num_shards)
    recipe = benchmark_recipe(plan, views=("center", "flip"))
    encoder = dataclasses.replace(recipe.encoder, grid=(shape[0], 1), width=shape[1])
    writer = StoreWriter.create_or_continue(path, dataclasses.replace(recipe, encoder=encoder), plan)
    generator = np.random.default_rng(0)
    for view, shard in writer.pending():
        rows = plan.rows_of(shard)
        with writer.shard(view, shard) as output:
            for first in range(0, len(rows), 1024):
                block = generator.standard_normal((min(1024, len(rows) - first), *shape), np.float32)
                output.write_block(first, {"tokens": block.astype(np.float16)})
            output.publish()
    writer.finalize()
    return open_store(path)


def report(results: list[Result], facts: dict[str, Any], path: Path) -> None:
    """Print the table and write everything measured as JSON."""
    print(HEADER)
    for result in results:
        print(result.line())
    for name, value in facts.items():
        print(f"{name}: {value}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "facts": facts,
        "results": [{**dataclasses.asdict(r), "ratio": r.ratio} for r in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
