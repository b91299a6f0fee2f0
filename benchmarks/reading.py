"""Reading a store: the goals of the store, measured against flat files and other people's loaders.

    python benchmarks/reading.py [--data DIR] [--rounds N] [--peers NAME,NAME] [--sections reader,loader,...]

Everything compared is measured in the same run on the same rows, in turns; ratios are medians over rounds. Each peer
runs in a virtual environment of its own under DIR, which sees this environment's packages behind its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import site
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Result, make_small_store, make_store, make_tokens, report, side_by_side
from peers import PEERS
from sparse_store import make_sparse_store

from shards import Loader, Store, open_store
from shards.reading.loader import page_aligned
from shards.reading.order import RowOrder, shuffle_quality
from shards.reading.shard_file import ReadMode

BATCH = 64
SECTIONS = ("reader", "small", "cold", "checksum", "loader", "kinds", "opening", "order")


def reader_results(
    tokens: np.ndarray, store: Store, rounds: int, *, field: str = "tokens"
) -> Iterator[Result]:
    """Rows into a reused buffer, warm, against a flat memory map."""
    num_rows = len(tokens)
    buffer = page_aligned((16, *tokens.shape[1:]), tokens.dtype)
    blocks = itertools.cycle(range(0, num_rows, 16))
    shuffled = np.random.default_rng(1).permutation(num_rows)
    modes: tuple[ReadMode, ...] = ("auto", "mmap", "pread")
    for mode in modes:
        reader = store.reader("center", field, mode=mode, verify="never")

        def flat_blocks() -> int:
            for first in itertools.islice(blocks, 16):
                np.copyto(buffer, tokens[first : first + 16])
            return 256

        def own_blocks(reader: Any = reader) -> int:
            for first in itertools.islice(blocks, 16):
                reader.read(range(first, first + 16), buffer)
            return 256

        singles = itertools.cycle(shuffled.tolist())

        def flat_singles(singles: Iterator[int] = singles) -> int:
            for index, row in enumerate(itertools.islice(singles, 256)):
                np.copyto(buffer[index & 15], tokens[row])
            return 256

        def own_singles(reader: Any = reader, singles: Iterator[int] = singles) -> int:
            for index, row in enumerate(itertools.islice(singles, 256)):
                reader.read((row,), buffer, (index & 15,))
            return 256

        goal = 0.9 if mode == "auto" else None
        rates = side_by_side(own_blocks, flat_blocks, rounds=rounds, slices=30, seconds=0.01)
        yield Result(f"{field} reader, sequential blocks of 16, {mode}", "flat memmap → buffer", goal, *rates)
        rates = side_by_side(own_singles, flat_singles, rounds=rounds, slices=30, seconds=0.01)
        yield Result(f"{field} reader, single random rows, {mode}", "flat memmap → buffer", goal, *rates)


class OwnLoader:
    """Our loader as a function that takes a batch."""

    def __init__(self, store: Store, **settings: Any) -> None:
        given = {"views": store.views[:1], "seed": 0, "global_batch_size": BATCH, **settings}
        self._loader = Loader(store, **given)
        self._batches = iter(self._loader)

    def __call__(self) -> int:
        """Take one batch and let it go."""
        batch = next(self._batches)
        batch.release()
        return len(batch.rows)

    def close(self) -> None:
        """Stop its threads."""
        self._loader.close()


def checksum_results(store: Store, rounds: int) -> Iterator[Result]:
    """Measure the loader with every row's CRC32C checked, against none checked."""
    for threads in (1, 2):
        checked = OwnLoader(store, verify="always", threads=threads)
        unchecked = OwnLoader(store, verify="never", threads=threads)
        rates = side_by_side(checked, unchecked, rounds=rounds, slices=4, seconds=0.2)
        checked.close()
        unchecked.close()
        yield Result(f"CRC checking on, {threads} thread(s)", "off", 0.95, *rates)


def kind_results(folder: Path, tokens: np.ndarray, store: Store, rounds: int) -> Iterator[Result]:
    """Other forms and compressions, and other thread counts, through the same loader."""
    base = OwnLoader(store)
    kinds = {
        "webdataset form": {"format": "webdataset"},
        "zarr with blosc": {"compression": "blosc"},
        "zarr with zstd": {"compression": "zstd"},
        "int8": {"dtype": "int8"},
        "int8 with zstd": {"dtype": "int8", "compression": "zstd"},
    }
    goals = {"int8": 1.7}
    for name, settings in kinds.items():
        other = make_store(folder / name.replace(" ", "-"), tokens, 8, **settings)
        loader = OwnLoader(other)
        rates = side_by_side(loader, base, rounds=rounds, slices=4, seconds=0.2)
        loader.close()
        yield Result(f"training loader, {name}", "training loader, zarr", goals.get(name), *rates)
    for settings in ({"threads": 1}, {"threads": 4}, {"mode": "mmap"}, {"mode": "pread"}):
        loader = OwnLoader(store, **settings)
        rates = side_by_side(loader, base, rounds=rounds, slices=4, seconds=0.2)
        loader.close()
        name = ", ".join(f"{k} {v}" for k, v in settings.items())
        yield Result(f"training loader, {name}", "training loader, 2 threads, auto", None, *rates)
    base.close()


def small_results(folder: Path, rounds: int) -> Iterator[Result]:
    """Rows of compact latents, 32×128 float16: shuffled batches of 1,024 against numpy's gather from memory."""
    num_rows, shape, batch = 200_000, (32, 128), 1024
    store = make_small_store(folder / "small", num_rows, shape, num_shards=16)
    rows = np.empty((num_rows, *shape), np.float16)
    store.reader(store.views[0], "tokens", verify="never").read(np.arange(num_rows), rows)
    buffer = page_aligned((batch, *shape), rows.dtype)
    generator = np.random.default_rng(2)

    def gathered() -> int:
        np.take(rows, generator.integers(num_rows, size=batch), axis=0, out=buffer, mode="clip")
        return batch

    for verify in ("first", "never"):
        for threads in (1, 2):
            loader = OwnLoader(store, global_batch_size=batch, threads=threads, verify=verify)
            for _ in range(2 * num_rows // batch):  # every row's checksum is compared once
                loader()
            rates = side_by_side(loader, gathered, rounds=rounds, slices=6, seconds=0.1)
            loader.close()
            what = f"training loader, rows of 8 KB, batches of 1,024, {threads} thread(s), verify {verify}"
            yield Result(what, "numpy.take of random rows in memory", 0.6, *rates)
    for views in (store.views,):
        loader = OwnLoader(store, global_batch_size=batch, views=views, threads=2)
        rates = side_by_side(loader, gathered, rounds=rounds, slices=6, seconds=0.1)
        loader.close()
        yield Result(
            f"the same, {len(views)} views, 2 threads", "numpy.take of random rows in memory", None, *rates
        )


class Peer:
    """Another loader in a process and an environment of its own."""

    def __init__(self, name: str, folder: Path, tokens: Path) -> None:
        self.name = name
        self._arguments = [str(tokens), str(folder / "peers" / name)]
        self._python = _environment(name, folder / "environments")
        data = folder / "peers" / name
        done = data / ".prepared"
        if not done.exists():
            subprocess.run(
                [self._python, "benchmarks/peers.py", name, "prepare", *self._arguments], check=True
            )
            done.touch()
        log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [self._python, "benchmarks/peers.py", name, "serve", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"{self.name} stopped without an answer; see its log")

    def rate(self, seconds: float) -> float:
        """Rows a second over some time."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._answer()["rows_per_second"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _environment(name: str, folder: Path) -> str:
    """Python of a virtual environment that has the peer, and everything else from this environment."""
    if name == "memmap-dataloader":
        return sys.executable
    path = folder / name
    python = path / "bin" / "python"
    if not (path / ".installed").exists():
        venv.create(path, with_pip=False)
        packages = next((path / "lib").glob("python*")) / "site-packages"
        (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
        package = {"zarr-python": "zarr"}.get(name, name)
        subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        (path / ".installed").touch()
    return str(python)


def loader_results(
    folder: Path, tokens: Path, store: Store, int8_store: Store, names: list[str], rounds: int
) -> Iterator[Result]:
    """Shuffled batches of 64, warm, in turns with the peers; idle loaders keep what they read ahead."""
    best: list[tuple[Result, list[float]]] = []
    for name in names:
        try:
            peer = Peer(name, folder, tokens)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(f"{name} cannot be measured: {error}", file=sys.stderr)
            continue
        ours, ours_int8, theirs = [], [], []
        for _ in range(rounds):
            ours.append(_own_rate(store))
            theirs.append(peer.rate(2.0))
            ours_int8.append(_own_rate(int8_store))
        peer.close()
        goal = 6.0 if name == "memmap-dataloader" else None
        result = Result("training loader, shuffled batches of 64", name, goal, ours, theirs)
        if goal is None:
            best.append((result, ours_int8))
        yield result
    if best:
        strongest, ours_int8 = min(best, key=lambda pair: pair[0].ratio)
        against = f"best peer: {strongest.against}"
        yield Result("training loader", against, 4.0, strongest.ours, strongest.theirs)
        yield Result("training loader, int8", f"{against}, float16", 8.0, ours_int8, strongest.theirs)


def _own_rate(store: Store) -> float:
    """Rows a second of our loader over a second, once it has read ahead."""
    own = OwnLoader(store)
    for _ in range(8):
        own()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 1.0:
        count += own()
    rate = count / (time.perf_counter() - begun)
    own.close()
    return rate


def drop_cache(paths: list[Path]) -> None:
    """Ask the kernel to forget the pages of some files."""
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Bytes this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def flat_preads(path: Path, order: np.ndarray, row_nbytes: int, threads: int) -> float:
    """Seconds in which threads read rows of a flat file, each row once, into buffers of their own."""
    header = path.stat().st_size - row_nbytes * len(order)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    turns = itertools.count()

    def work() -> None:
        buffer = page_aligned((row_nbytes,), np.dtype(np.uint8))
        while (turn := next(turns)) < len(order):
            os.preadv(descriptor, [buffer], header + int(order[turn]) * row_nbytes)

    begun = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(descriptor)
    return time.perf_counter() - begun


def cold_results(tokens: Path, store_path: Path, rounds: int) -> Iterator[Result]:
    """Yield an epoch, shuffled, with nothing in the page cache."""
    store = open_store(store_path)
    row_nbytes = store.num_tokens * store.width * 2
    files = [*sorted((store_path / "center" / "tokens" / "c").glob("*/0/0")), tokens]
    order = RowOrder(store.valid_rows, 0).epoch(0)
    for threads in (2, 4):
        ours, theirs, amplification = [], [], []
        for _ in range(rounds):
            drop_cache(files)
            theirs.append(len(order) / flat_preads(tokens, order, row_nbytes, threads))
            drop_cache(files)
            before, begun = disk_bytes(), time.perf_counter()
            loader = OwnLoader(store, threads=threads, verify="never")
            for _ in range(len(order) // BATCH):
                loader()
            ours.append(len(order) / (time.perf_counter() - begun))
            loader.close()
            amplification.append((disk_bytes() - before) / (len(order) * row_nbytes))
        yield Result(
            f"cold cache, shuffled, {threads} threads", "threaded pread of the same rows", 0.9, ours, theirs
        )
        yield Result(
            f"cold cache, {threads} threads: payload",
            "bytes read from the disk (at most 1.2×)",
            1 / 1.2,
            [1.0] * rounds,
            amplification,
            unit="× payload",
        )


def opening_facts(folder: Path) -> dict[str, Any]:
    """Measure opening a store of ImageNet's size in a fresh process."""
    path = make_sparse_store(folder / "sparse", num_images=1_280_000, num_shards=1024)
    script = (
        "import time, sys, json\n"
        "from shards.reading.store import open_store\n"
        "from shards.reading.loader import Loader\n"
        "import pyarrow.parquet\n"
        "t0 = time.perf_counter()\n"
        "store = open_store(sys.argv[1])\n"
        "t1 = time.perf_counter()\n"
        "batches = iter(Loader(store, views=('center',), seed=0, global_batch_size=64))\n"
        "next(batches)\n"
        "print(json.dumps([t1 - t0, time.perf_counter() - t0]))\n"
    )
    times = []
    for _ in range(3):
        answer = subprocess.run(
            [sys.executable, "-c", script, path], check=True, capture_output=True, text=True
        )
        times.append(json.loads(answer.stdout))
    opened, first = np.median(np.array(times), axis=0)
    return {
        "open 1024 shards, 1.28 million rows (goal under 1 s)": f"{opened:.2f} s",
        "first batch after opening began (goal under 2 s)": f"{first:.2f} s",
    }


def order_facts() -> dict[str, Any]:
    """Time and memory of one epoch's order, and what the locality knob does to it."""
    import tracemalloc

    rows = np.arange(1_300_000, dtype=np.int64)
    times = []
    for epoch in range(5):
        begun = time.perf_counter()
        RowOrder(rows, 0).epoch(epoch)
        times.append(time.perf_counter() - begun)
    tracemalloc.start()
    RowOrder(rows, 0).epoch(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    facts = {
        "order of 1.3 million rows (goal 0.2 s, 64 MB)": f"{np.median(times):.3f} s, {peak / 1e6:.0f} MB"
    }
    capacity = -(-len(rows) // 1024)
    for group in (None, 256, 64, 16, 4, 1, 0):
        quality = shuffle_quality(RowOrder(rows, 0, group, capacity=capacity).epoch(0), capacity)
        facts[f"shuffle quality, group {group}"] = f"{quality:.3f}"
    return facts


def main() -> None:
    """Measure what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "rae-latents-benchmark"
    parser.add_argument(
        "--data", type=Path, default=default, help="where rows, stores and environments are kept"
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reading.json"))
    options = parser.parse_args()
    flat = options.data / f"tokens-{options.rows}.npy"
    tokens = make_tokens(flat, options.rows)
    store = make_store(options.data / "zarr", tokens, 8)
    sections = options.sections.split(",")
    results: list[Result] = []
    facts: dict[str, Any] = {}
    tokens[:].sum(dtype=np.float64)
    if "reader" in sections:
        results += reader_results(tokens, store, options.rounds)
    if "small" in sections:
        results += small_results(options.data, options.rounds)
    if "checksum" in sections:
        results += checksum_results(store, options.rounds)
    if "kinds" in sections:
        results += kind_results(options.data, tokens, store, options.rounds)
    if "loader" in sections:
        int8 = make_store(options.data / "int8", tokens, 8, dtype="int8")
        results += loader_results(options.data, flat, store, int8, options.peers.split(","), options.rounds)
    if "cold" in sections:
        del tokens
        results += cold_results(flat, options.data / "zarr", min(options.rounds, 5))
    if "opening" in sections:
        facts |= opening_facts(options.data)
    if "order" in sections:
        facts |= order_facts()
    report(results, facts, options.out)


if __name__ == "__main__":
    main()
