"""Encoding end to end, against the encoder alone and against decoding alone, on the same device, batch and cores.

    python benchmarks/encoding.py [--device cuda:0] [--precision bfloat16] [--compile] [--encoder NAME] ...

Ours reads files, decodes, encodes, copies back, writes and commits shards of a store. Where the encoder is the limit,
the other is the encoder on images that are decoded already; where decoding is the limit, the other decodes and crops
the same files with as many threads. Weights are random: they do not change what anything costs. A third pair stands in
for devices that are not here: one that takes its time for each image, and no core. Fast ones (`--fast`) get images that
are decoded already and write to a RAM disk, which shows how far the writers of this machine hold.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `pipeline` does, before torch is loaded
import torch
from measuring import Result, benchmark_plan, report
from PIL import Image

from pipeline.encode.claims import Claims, Failures, Task
from pipeline.encode.decoding import BatchDecoder, DecodedBatch, DecodedRow, RowBatches, batch_length
from pipeline.encode.leases import Leases, Owner
from pipeline.encode.targets import Target
from pipeline.encode.worker import Worker
from pipeline.encoders.encoder import create_encoder
from pipeline.encoders.frozen import Encoder
from pipeline.sources.crop_sources import ImageFiles
from pipeline.sources.crops import Crops
from pipeline.sources.listing import list_source
from shards import Execution, Int8Code, Plan, Recipe, SourceReader, SourceRecord, StoreWriter, usable_cores

VIEWS = ("center", "flip")
_READY_IMAGES = 2048


class StandIn(torch.nn.Module):
    """Takes the place of an encoder on a device of `rate` images a second that computes without the processor."""

    def __init__(self, encoder: Encoder, batch_size: int, rate: float) -> None:
        super().__init__()
        self.identity, self.precision, self.rate = encoder.identity, encoder.precision, rate
        self.register_buffer("mean", torch.zeros(1))
        shape = (batch_size, self.identity.num_tokens, self.identity.width)
        self.tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()

    @property
    def device(self) -> torch.device:
        """The processor, which waits for it."""
        return torch.device("cpu")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the same tokens for all, as the store keeps them, once their time is over."""
        time.sleep(len(pixels) / self.rate)
        return self.tokens[: len(pixels)]


class ReadyImages(BatchDecoder):
    """Images that are in memory already."""

    def _new(self) -> torch.Tensor:
        return super()._new().fill_(128)

    def _start(self, batch: DecodedBatch, records: Sequence[SourceRecord]) -> list[Future[list[DecodedRow]]]:
        done: Future[list[DecodedRow]] = Future()
        done.set_result([DecodedRow(None, 0.0, 0.0) for _ in records])
        return [done]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        encoder: The encoder on its device, or what stands in for it.
        plan: The images, as a plan of two shards.
        recipe: What the store holds.
        batch_size: Rows of a batch.
        threads: Decode threads.
        ready: Whether the images are decoded already.
        place: Folder for the store; None is the usual one for temporary files.
        code: Of int8 tokens.
    """

    encoder: Encoder | StandIn
    plan: Plan
    recipe: Recipe
    batch_size: int
    threads: int
    ready: bool = False
    place: Path | None = None
    code: Int8Code | None = None

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return self.encoder.device


def photographs(folder: Path, count: int, size: tuple[int, int]) -> Plan:
    """Write JPEG files of a camera's detail, once; return a plan of two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            generator = np.random.default_rng(number)
            coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
            noise = generator.normal(0, 6, pixels.shape).astype(np.int16)
            Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
    return Plan.build(list_source(str(folder)).records[:count], (), num_shards=2, seed=0)


def recipe_for(
    encoder: Encoder | StandIn, plan: Plan, image_size: int, views: tuple[str, ...] = VIEWS
) -> Recipe:
    """Return a store of some views with images of a size."""
    return Recipe(
        encoder=encoder.identity,
        **plan.recipe_values(),
        views=views,
        image_size=image_size,
        precision=encoder.precision,
    )


def end_to_end(case: Case) -> float:
    """Images a second from files to a committed shard, in all views."""
    with tempfile.TemporaryDirectory(dir=case.place) as folder:
        writer = StoreWriter.create_or_continue(Path(folder) / "store", case.recipe, case.plan, case.code)
        source = ImageFiles(SourceReader(), Crops(case.recipe))
        rows = (ReadyImages if case.ready else BatchDecoder)(
            source,
            length=batch_length(case.recipe.capacity, case.batch_size),
            threads=case.threads,
            pin_memory=case.device.type == "cuda",
        )
        return case.plan.num_images / seconds_to_write(writer, case.encoder, rows, case.batch_size)


def seconds_to_write(writer: StoreWriter, encoder: Any, rows: RowBatches, batch_size: int) -> float:
    """Return the seconds in which a worker writes all shards of a store that has been begun.

    Args:
        writer: The store.
        encoder: What makes its tokens, on its device.
        rows: Gives what they are made of; closed afterwards.
        batch_size: Most rows of a batch.
    """
    with Leases(writer.path, Owner.this_process("benchmark")) as leases:
        claims = Claims(writer.pending, leases, Failures(writer.path, 1))
        with Worker(
            encoder,
            [Target(writer)],
            rows,
            claims,
            lambda event: None,
            name="benchmark",
            length=batch_length(writer.recipe.capacity, batch_size),
            most_shards=max(1, min(4, usable_cores() // len(writer.recipe.views))),
        ) as worker:
            if encoder.device.type == "cuda":
                worker.try_out(Execution(batch_size=batch_size, compiled=False))
            began = time.perf_counter()
            worker.run()
            seconds = time.perf_counter() - began
    assert not writer.pending()
    return seconds


def encoder_alone(case: Case) -> float:
    """Images a second through the encoder in all views, on decoded images, results left on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, 3, case.recipe.image_size, case.recipe.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(case.device)
    batches = -(-case.plan.num_images // case.batch_size)
    began = time.perf_counter()
    for _ in range(batches):
        for _ in case.recipe.views:
            case.encoder.encode(pixels)
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    return batches * case.batch_size / (time.perf_counter() - began)


def decoding_alone(case: Case) -> float:
    """Images a second through reading, decoding and cropping."""
    decoder = BatchDecoder(
        ImageFiles(SourceReader(), Crops(case.recipe)),
        length=case.batch_size,
        threads=case.threads,
    )
    return case.plan.num_images / seconds_to_read(decoder, case.plan, case.recipe.views)


def seconds_to_read(rows: RowBatches, plan: Plan, views: tuple[str, ...]) -> float:
    """Return the seconds in which a plan's rows are there to be encoded, batch after batch; closes `rows`."""
    began = time.perf_counter()
    for shard in range(plan.num_shards):
        window = []
        for batch in rows.batches(Task(shard, views), plan.records_of(shard)):
            window.append(batch)
            if len(window) == 3:
                window[0].rows()
                rows.recycle(window.pop(0))
        for batch in window:
            batch.rows()
            rows.recycle(batch)
    seconds = time.perf_counter() - began
    rows.close()
    return seconds


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "rae-latents-benchmark"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--encoder", default="vit_base_patch14_reg4_dinov2")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--images", type=int, default=32, help="images of a round where the encoder is the limit"
    )
    parser.add_argument(
        "--large", type=int, default=192, help="images of a round where decoding is the limit"
    )
    parser.add_argument("--many", type=int, default=2048, help="images of a round where a stand-in is")
    parser.add_argument("--stand-in", type=float, nargs="*", default=[100, 200], help="images/s of stand-ins")
    parser.add_argument(
        "--fast",
        type=float,
        nargs="*",
        default=[1000, 2000, 4000, 8000],
        help="images/s of stand-ins without decoding",
    )
    parser.add_argument(
        "--only-stand-ins", action="store_true", help="leave out what wants the encoder itself"
    )
    parser.add_argument("--ram", type=Path, default=Path("/dev/shm"), help="folder on a RAM disk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoding.json"))
    options = parser.parse_args()

    device = torch.device(options.device)
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    encoder = create_encoder(options.encoder, "random:0").to_device(device, precision)
    if options.compile:
        encoder.compile_trunk()
    crop = 16 * encoder.identity.grid[0]
    small = create_encoder("test_vit", "random:0", input_size=32, model_args={"depth": 1}).to_device(
        device, precision
    )
    threads = usable_cores()
    photos = photographs(options.data / "photographs", options.images, (500, 375))
    large = photographs(options.data / "large", options.large, (2000, 1500))
    cases = [
        (f"encode with {options.encoder}, {precision}", "the encoder alone", encoder_alone,
         Case(encoder, photos, recipe_for(encoder, photos, crop), options.batch_size, threads)),
        ("encode 3-megapixel files with a tiny encoder", "decoding alone", decoding_alone,
         Case(small, large, recipe_for(small, large, 64), options.batch_size, threads)),
    ]  # fmt: skip
    if options.only_stand_ins:
        cases = []
    many = photographs(options.data / "photographs", options.many, (500, 375))
    for rate in options.stand_in:
        device_of_rate = StandIn(encoder, 32, rate)
        recipe = recipe_for(device_of_rate, many, crop, ("center",))
        cases.append((f"encode on a stand-in of {rate:g} images/s", "the stand-in alone", encoder_alone,
                      Case(device_of_rate, many, recipe, 32, threads)))  # fmt: skip
    for rate in options.fast:
        device_of_rate = StandIn(encoder, 256, rate)
        plan = benchmark_plan(_READY_IMAGES, 8)
        for views in (("center",), VIEWS):
            recipe = recipe_for(device_of_rate, plan, crop, views)
            case = Case(device_of_rate, plan, recipe, 256, threads, ready=True, place=options.ram)
            cases.append(
                (
                    f"a stand-in of {rate:g} images/s, {len(views)} views, RAM disk",
                    "the stand-in alone",
                    encoder_alone,
                    case,
                )
            )
    results = []
    for what, against, other, case in cases:
        end_to_end(case)  # warms file cache, allocator and compiler
        other(case)
        rates: tuple[list[float], list[float]] = ([], [])
        for turn in range(options.rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                rates[which].append((end_to_end, other)[which](case))
        results.append(Result(what, against, 0.95, *rates, unit="images/s"))
    facts = {
        "device": str(device),
        "precision": precision,
        "batch size": options.batch_size,
        "threads": threads,
    }
    report(results, facts, options.out)


if __name__ == "__main__":
    main()
