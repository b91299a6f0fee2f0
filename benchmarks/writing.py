"""Writing a shard through the whole commit protocol, against writing and flushing the same bytes.

    python benchmarks/writing.py [--data DIR] [--rows N] [--rounds N]

Ours computes digests, checksums and statistics, publishes and records; the other is ``write`` and ``fsync``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import Result, benchmark_plan, benchmark_recipe, make_tokens, report

from shards import StoreWriter

BLOCK = 32


def raw_seconds(path: Path, tokens: np.ndarray) -> float:
    """Seconds to write and flush the rows as one file, in the same blocks."""
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for first in range(0, len(tokens), BLOCK):
        os.write(descriptor, tokens[first : first + BLOCK].data)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - begun


def own_seconds(writer: StoreWriter, shard: int, tokens: np.ndarray) -> float:
    """Seconds from opening a shard to its commit record."""
    begun = time.perf_counter()
    with writer.shard("center", shard) as output:
        for first in range(0, len(tokens), BLOCK):
            output.write_block(first, {"tokens": tokens[first : first + BLOCK]})
        output.publish()
    return time.perf_counter() - begun


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "rae-latents-benchmark"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--rows", type=int, default=1024, help="rows of a shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/writing.json"))
    options = parser.parse_args()
    tokens = np.array(make_tokens(options.data / f"tokens-{options.rows}.npy", options.rows))
    plan = benchmark_plan(options.rows * (options.rounds + 1), options.rounds + 1)
    kinds = {"zarr": {}, "webdataset": {"format": "webdataset"}}
    results = []
    for name, settings in kinds.items():
        folder = options.data / "writing" / name
        shutil.rmtree(folder, ignore_errors=True)
        writer = StoreWriter.create_or_continue(folder, benchmark_recipe(plan, **settings), plan)
        ours, theirs = [], []
        for shard in range(options.rounds + 1):
            theirs.append(options.rows / raw_seconds(folder / "raw", tokens))
            (folder / "raw").unlink()
            ours.append(options.rows / own_seconds(writer, shard, tokens))
            shutil.rmtree(folder / "center", ignore_errors=True)
        # the first turn warms both up
        results.append(Result(f"writing a shard, {name}", "raw write and fsync", 0.75, ours[1:], theirs[1:]))
        shutil.rmtree(folder)
    report(results, {"rows a shard": options.rows}, options.out)


if __name__ == "__main__":
    main()
