"""One checkout's side of `benchmarks/writing.py`: writes shards from a batch's buffers as `pipeline encode` does.

    python benchmarks/row_cost.py CHECKOUT FOLDER FORMAT ROWS IMAGE_SIZE SUMS

For each line on standard input it writes the same rows twice, plainly and as a shard, and prints a line of JSON: of
each the seconds by the clock, and of all this process's threads. Buffers and sums are those of the checkout's worker;
SUMS is `host`, or `device` where a GPU has added the tokens up before they are written: off the clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

CHECKOUT = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measuring import StoreWriter, benchmark_plan, benchmark_recipe  # noqa: E402

try:
    from pipeline.encode.buffers import page_aligned
    from pipeline.encode.sums import DeviceSums, sums_for
except ImportError:  # a checkout from before there were any
    page_aligned = sums_for = DeviceSums = None

BATCH = 64


def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory as the checkout's worker has it."""
    if page_aligned is None:
        return torch.empty(shape, dtype=dtype)
    return page_aligned(shape, dtype, pin_memory=False)


def clocks() -> tuple[float, float]:
    """Time by the clock and of this process's threads, in seconds."""
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> list[float]:
    """Seconds since `clocks`."""
    return [now - then for now, then in zip(clocks(), begun, strict=True)]


def write_plainly(path: Path, batch: dict[str, np.ndarray], rows: int) -> list[float]:
    """Seconds to write and flush the rows as one file a field."""
    begun = clocks()
    for name, values in batch.items():
        descriptor = os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for first in range(0, rows, BATCH):
            part = memoryview(values[: min(BATCH, rows - first)]).cast("B")
            while part:
                part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = since(begun)
    for name in batch:
        (path / name).unlink()
    return seconds


def added_up(tokens: np.ndarray, rows: int) -> DeviceSums:
    """Return the sums of a shard as they come from a device."""
    sums = DeviceSums(tokens.shape[1:], torch.device("cpu"))
    for first in range(0, rows, BATCH):
        sums.add(torch.from_numpy(tokens), range(min(BATCH, rows - first)))
    source, target = sums.copy_to_host
    target.copy_(source)
    return sums


def write_shard(writer: StoreWriter, shard: int, batch: dict[str, np.ndarray], rows: int) -> list[float]:
    """Seconds from opening a shard to its commit record."""
    sums = None if sums_for is None else sums_for(writer.recipe, torch.device("cpu"))
    if sums is not None and sys.argv[6] == "device":
        sums = added_up(batch["tokens"], rows)
    more = {} if sums is None else {"sums": sums}
    begun = clocks()
    with writer.shard("center", shard, **more) as output:
        for first in range(0, rows, BATCH):
            output.write_block(first, {name: values[: rows - first] for name, values in batch.items()})
        output.publish()
    return since(begun)


def main() -> None:
    """Answer each line on standard input with a round."""
    folder, form, rows, size = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = buffer((BATCH, 256, 768), torch.float16)
    tokens.copy_(torch.randn(tokens.shape, generator=generator))
    batch = {"tokens": tokens.numpy()}
    if size:
        images = buffer((BATCH, size, size, 3), torch.uint8)
        images.copy_(torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator))
        batch["image"] = images.numpy()
    plan = benchmark_plan(rows * 64, 64)
    for round_number, _ in enumerate(sys.stdin):
        path = folder / f"round-{round_number}"
        recipe = dataclasses.replace(benchmark_recipe(plan, format=form), image_size=size)
        writer = StoreWriter.create_or_continue(path, recipe, plan)
        answer = {"raw": write_plainly(path, batch, rows), "own": write_shard(writer, 0, batch, rows)}
        shutil.rmtree(path)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
