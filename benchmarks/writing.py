"""What a row costs from the encoder's buffer to the published shard: processor time, and the clock against a raw write.

    python benchmarks/writing.py [--data DIR] [--ram DIR] [--rows N] [--rounds N] [--baseline CHECKOUT]

Rows are float16 tokens of 256 × 768 with an image of 256 pixels, and without. A row's digest, checksums and statistics
are computed, and the shard is published and recorded; the other side is ``write`` and ``fsync`` of the same bytes, or
with ``--baseline`` another checkout of this repository.
With sums by a GPU, tokens are added up off the clock. Sides take turns, each in a process of its own
(`benchmarks/row_cost.py`); processor time is that of all threads of the process, inside the kernel too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from measuring import Result, report

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"zarr, with images, sums by a GPU": ("zarr", 256, "device"),
          "zarr, with images": ("zarr", 256, "host"), "zarr, tokens alone": ("zarr", 0, "host"),
          "webdataset, with images": ("webdataset", 256, "host")}  # fmt: skip


@dataclass(frozen=True)
class Round:
    """Seconds of one round: by the clock, and of all threads."""

    shard: tuple[float, float]
    raw: tuple[float, float]


class Checkout:
    """A process that writes rows with the code of a checkout."""

    def __init__(self, path: Path, folder: Path, form: str, rows: int, image_size: int, sums: str) -> None:
        arguments = [path, folder, form, rows, image_size, sums]
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "benchmarks" / "row_cost.py", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def round(self) -> Round:
        """Write the rows once more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Round(tuple(answer["own"]), tuple(answer["raw"]))


def measure(
    name: str, where: str, folder: Path, rows: int, rounds: int, baseline: Path | None
) -> list[Result]:
    """Return the lines of one kind of row in one place."""
    form, image_size, sums = SHAPES[name]
    mine, others = [], []
    with Checkout(ROOT, folder, form, rows, image_size, sums) as ours:
        other = None if baseline is None else Checkout(baseline, folder, form, rows, image_size, sums)
        for _ in range(rounds + 1):
            mine.append(ours.round())
            if other is not None:
                others.append(other.round())
        if other is not None:
            other.__exit__(None, None, None)
    mine, others = mine[1:], others[1:]  # the first round warms up

    def per_second(which: int, seconds: list[tuple[float, float]]) -> list[float]:
        return [rows / one[which] for one in seconds]

    shards, raw = [one.shard for one in mine], [one.raw for one in mine]
    results = [
        Result(f"{name}, {where}: by the clock", "raw write and fsync", None,
               per_second(0, shards), per_second(0, raw)),
        Result(f"{name}, {where}: a core", "raw write and fsync", None,
               per_second(1, shards), per_second(1, raw), unit="rows/core-s"),
    ]  # fmt: skip
    if others:
        before = [one.shard for one in others]
        results += [
            Result(f"{name}, {where}: by the clock", "the baseline", None,
                   per_second(0, shards), per_second(0, before)),
            Result(f"{name}, {where}: a core", "the baseline", 3.0,
                   per_second(1, shards), per_second(1, before), unit="rows/core-s"),
        ]  # fmt: skip
    cost = statistics.median(one.shard[1] for one in mine) / rows
    print(f"{name}, {where}: {cost * 1e6:.0f} µs of a core a row", flush=True)
    return results


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "rae-latents-benchmark"
    parser.add_argument("--data", type=Path, default=default, help="folder on the disk to measure")
    parser.add_argument("--ram", type=Path, default=Path("/dev/shm"), help="folder on a RAM disk")
    parser.add_argument("--rows", type=int, default=512, help="rows of a shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--baseline", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--only", nargs="*", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/writing.json"))
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    results = []
    for where, place in (("RAM disk", options.ram), ("disk", options.data)):
        for name in options.only:
            folder = place / f"rae-latents-writing-{os.getpid()}"
            folder.mkdir(parents=True)
            try:
                results += measure(name, where, folder, options.rows, options.rounds, options.baseline)
            finally:
                shutil.rmtree(folder)
    load.append(os.getloadavg()[0])
    facts = {
        "rows a shard": options.rows,
        "load before and after": " ".join(f"{one:.1f}" for one in load),
        "baseline": None if options.baseline is None else revision(options.baseline),
    }
    report(results, facts, options.out)


def revision(checkout: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
