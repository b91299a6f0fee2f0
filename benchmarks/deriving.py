"""Writing a field of compact latents, against reading the tokens alone and the network alone, whichever is slower.

    python benchmarks/deriving.py [--device cuda:0] [--precision bfloat16] [--rows N] [--rounds N]

Ours reads the stored tokens [256, 768] of the views center and flip, makes latents of them and writes and commits the
shards of the field. Reading alone fills the same buffers by the same threads; the network alone computes on tokens that
are on its device. Rounds take turns. A stand-in takes its time for each row and no core, as a device does.
Out of the page cache reading takes every core it is given, so that on few of them nothing is left for writing; a store
that is larger than the memory is read from its disk. In rounds of a few shards, what beginning and ending take counts
more than it does in a store.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `pipeline` does, before torch is loaded
import numpy as np
import torch
from encoding import seconds_to_read, seconds_to_write
from measuring import Result, benchmark_plan, benchmark_recipe, report
from torch import Tensor

from pipeline.encode.decoding import batch_length
from pipeline.encode.stored_batches import StoredBatches
from pipeline.encoders.latents import LatentEncoder
from shards import EncoderIdentity, Store, StoreWriter, open_store, usable_cores
from shards.formats import object_path
from shards.metadata.layout import field_of
from train.models.build import build_model
from train.models.flat_config import FLAT_SIZES, FlatConfig, FlatHalfConfig, FlatSize
from train.weights.compressor import load_compressor
from train.weights.snapshot import SnapshotMeta, save_snapshot

VIEWS = ("center", "flip")
SHARD = 1252
"""Rows of a shard, as of ImageNet in 1024 of them."""
SIZES = {
    "flat-tiny": FlatSize(160, 1, 4, 480),
    "flat of width 192, 4 blocks": FlatSize(192, 4, 3, 768),
    "flat-32x128": FLAT_SIZES["s"],
}
"""The half of a compressor that makes latents."""


class StandIn:
    """Takes the place of a compressor on a device of `rate` rows a second that computes without the processor."""

    def __init__(self, identity: EncoderIdentity, batch_size: int, rate: float) -> None:
        self.identity, self.rate, self.device = identity, rate, torch.device("cpu")
        self.latents = torch.randn(batch_size, identity.num_tokens, identity.width).half()

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the same latents for all, as the field keeps them, once their time is over."""
        if self.rate < float("inf"):
            time.sleep(len(tokens) / self.rate)
        return self.latents[: len(tokens)]


@dataclass(frozen=True)
class Case:
    """One compressor and the rows it is given."""

    what: str
    encoder: LatentEncoder | StandIn
    store: Store
    batch_size: int
    cold: bool = False
    """Whether the page cache has forgotten the tokens at the beginning of a round."""

    @property
    def rows(self) -> int:
        """Rows of a round, each in all views."""
        return self.store.num_rows

    def batches(self) -> StoredBatches:
        """Return the store's tokens, read again with all their checksums."""
        if self.cold:
            forget(self.store)
        return StoredBatches(
            open_store(self.store.path),
            images=False,
            length=batch_length(self.store.capacity, self.batch_size),
            threads=usable_cores(),
            pin_memory=self.encoder.device.type == "cuda",
        )

    def written(self) -> float:
        """Return rows a second from stored tokens to committed shards."""
        recipe = dataclasses.replace(
            self.store.recipe, encoder=self.encoder.identity, source_digest=self.store.plan.source_digest()
        )
        with tempfile.TemporaryDirectory(dir=self.store.path.parent) as folder:
            writer = StoreWriter.create_or_continue(Path(folder) / "field", recipe, self.store.plan)
            return self.rows / seconds_to_write(writer, self.encoder, self.batches(), self.batch_size)

    def read(self) -> float:
        """Return rows a second of reading alone."""
        return self.rows / seconds_to_read(self.batches(), self.store.plan, VIEWS)

    def computed(self) -> float:
        """Return rows a second of the network alone."""
        length = batch_length(self.store.capacity, self.batch_size)
        shape = (length, self.store.num_tokens, self.store.width)
        tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(self.encoder.device)
        self.encoder.encode(tokens)
        batches = -(-self.rows // length)
        synchronized(self.encoder.device)
        began = time.perf_counter()
        for _ in range(batches * len(VIEWS)):
            self.encoder.encode(tokens)
        synchronized(self.encoder.device)
        return batches * length / (time.perf_counter() - began)


def forget(store: Store) -> None:
    """Have the page cache forget a store's tokens."""
    for view in VIEWS:
        for shard in range(store.plan.num_shards):
            path = store.path / object_path(store.recipe, field_of(store.recipe, view, "tokens"), shard)
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def synchronized(device: torch.device) -> None:
    """Wait until a device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def token_store(path: Path, num_rows: int, num_shards: int, *, linked: bool) -> Store:
    """Make a store of random float16 tokens [256, 768] in two views.

    Where it is `linked` its full shards are names of one file: all of it is then in the page cache, and still too large
    for a processor's own caches.
    """
    plan = benchmark_plan(num_rows, num_shards)
    recipe = benchmark_recipe(plan, views=VIEWS)
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    block = np.random.default_rng(0).standard_normal((16, 256, 768), np.float32).astype(np.float16)
    files = {
        (view, shard): path / object_path(recipe, field_of(recipe, view, "tokens"), shard)
        for view, shard in writer.pending()
    }
    first_file = files[VIEWS[0], 0]
    for (view, shard), file in files.items():
        length = plan.shard_size(shard)
        with writer.shard(view, shard) as output:
            for first in range(0, length, 16):
                output.write_block(first, {"tokens": block[: length - first]})
            output.publish()
        if linked and length == recipe.capacity and file != first_file:
            file.unlink()
            file.hardlink_to(first_file)
    writer.finalize()
    return open_store(path)


def latent_encoder(size: FlatSize, store: Store, folder: Path, precision: str) -> LatentEncoder:
    """Make a compressor with random weights, read from a snapshot as `pipeline add-field` does."""
    half = FlatHalfConfig(**size._asdict())
    config = FlatConfig(
        num_tokens=store.num_tokens,
        token_width=store.width,
        num_latents=32,
        latent_width=128,
        encoder=half,
        decoder=dataclasses.replace(half, depth=1),
    )
    meta = SnapshotMeta(
        encoder=store.recipe.encoder.to_dict(), class_names=(), num_classes=1, grid=store.grid, width=store.width,
        step=1, samples_seen=1, ema_rate=0.0, dtype=store.recipe.dtype,
    )  # fmt: skip
    path = folder / "compressor.safetensors"
    save_snapshot(path, build_model(config).state_dict(), config=config, normalizer=None, meta=meta)
    return LatentEncoder(load_compressor(path), store, precision)


def measured(case: Case, rounds: int) -> Result:
    """Measure ours against the slower of both; print what each reaches."""
    rates: dict[Callable[[], float], list[float]] = {case.written: [], case.read: [], case.computed: []}
    for function in rates:
        function()  # warms the page cache, allocator and compiler
    for turn in range(rounds):
        for function in (*rates,) if turn % 2 else reversed((*rates,)):
            rates[function].append(function())
    written, read, computed = rates.values()
    medians = [statistics.median(values) for values in (written, read, computed)]
    print(
        f"{case.what}: written {medians[0]:.0f}, read {medians[1]:.0f}, computed {medians[2]:.0f} rows/s, each in "
        f"{len(VIEWS)} views",
        flush=True,
    )
    slower, against = (read, "reading alone") if medians[1] < medians[2] else (computed, "the network alone")
    return Result(case.what, against, 0.9, written, slower)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, choices=["float32", "bfloat16"])
    parser.add_argument(
        "--rows", type=int, default=20032, help="rows of the stored tokens, each in two views"
    )
    parser.add_argument("--few", type=int, default=256, help="rows of a round of networks on a CPU")
    parser.add_argument("--cold", type=int, default=1024, help="rows of a round that reads from the disk")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stand-in", type=float, nargs="*", default=[1000, 2000], help="rows/s of stand-ins")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deriving.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    results = []
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=options.data) as place:
        folder, batch = Path(place), options.batch_size
        many = token_store(folder / "many", options.rows, max(2, options.rows // SHARD), linked=True)
        some = token_store(
            folder / "some", options.rows // 4, max(2, options.rows // 4 // SHARD), linked=True
        )
        few = many if device.type == "cuda" else token_store(folder / "few", options.few, 2, linked=True)
        for name in SIZES if device.type == "cuda" else list(SIZES)[:2]:
            encoder = latent_encoder(SIZES[name], few, folder, precision).to_device(device, precision)
            results.append(measured(Case(f"{name}, {device}", encoder, few, batch), options.rounds))
        identity = latent_encoder(SIZES["flat-tiny"], some, folder, precision).identity
        torch.set_num_threads(1)  # a device beside the processor leaves it copies alone
        for rate in options.stand_in:
            case = Case(
                f"a stand-in of {rate:g} rows/s of a view", StandIn(identity, batch, rate), some, batch
            )
            results.append(measured(case, options.rounds))
        at_once = StandIn(identity, batch, float("inf"))
        case = Case("a stand-in that takes no time, page cache", at_once, many, batch)
        results.append(measured(case, options.rounds))
        cold = token_store(folder / "cold", options.cold, 2, linked=False)
        case = Case("a stand-in that takes no time, cold disk", at_once, cold, batch, cold=True)
        results.append(measured(case, options.rounds))
    load.append(os.getloadavg()[0])
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "rows of a batch": options.batch_size,
        "threads": usable_cores(),
        "load before and after": " ".join(f"{one:.1f}" for one in load),
    }
    report(results, facts, options.out)


if __name__ == "__main__":
    main()
