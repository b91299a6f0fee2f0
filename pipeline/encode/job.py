"""A worker from nothing but its settings: what every engine starts, in its own process or another."""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.encode.claims import Claims, Failures
from pipeline.encode.decoding import BatchDecoder, RowBatches, batch_length
from pipeline.encode.execution import execution_of
from pipeline.encode.leases import Leases, Owner
from pipeline.encode.progress import Event, WorkerStarted
from pipeline.encode.stored_batches import StoredBatches
from pipeline.encode.targets import open_targets, pending_in_any
from pipeline.encode.worker import Worker
from pipeline.encoders.encoder import create_encoder
from pipeline.encoders.frozen import Encoder
from pipeline.encoders.latents import LatentEncoder, RowEncoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import crop_source
from shards import StoreWriter, as_location, open_store, usable_cores

_MOST_SHARDS = 4


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """One worker of a run.

    Attributes:
        config: Settings of the run.
        device: Where its encoder computes, such as `cuda:1`.
        rank: Its number among the workers of the run.
        world_size: How many workers the run has.
        processes: Workers on its machine, among which the cores are divided.
        name: What people call it.
    """

    config: EncodeConfig
    device: str
    rank: int = 0
    world_size: int = 1
    processes: int = 1
    name: str


def decode_threads_for(config: EncodeConfig, processes: int) -> int:
    """Decode threads of each of `processes` workers of this machine, on which they are counted."""
    return config.work.decode_threads or max(1, usable_cores() // processes)


def most_shards(spec: WorkerSpec, writer: StoreWriter) -> int:
    """Return how many shards a worker may write at once: its share of the cores, with a thread a view."""
    return max(1, min(_MOST_SHARDS, usable_cores() // (spec.processes * len(writer.recipe.views))))


def build_encoder(config: EncodeConfig) -> RowEncoder:
    """Build the encoder or compressor that the settings name, on the CPU."""
    if config.compressor is not None:
        return latent_encoder(config)
    return image_encoder(config)


def latent_encoder(config: EncodeConfig) -> LatentEncoder:
    """Return the compressor that the settings name, for the tokens of the store that is the source.

    Raises:
        UserError: If it is no compressor, or not one for these tokens.
    """
    from train.weights.compressor import load_compressor

    assert config.compressor is not None
    store = open_store(as_location(config.source_path()))
    compressor = load_compressor(config.compressor, decoders=True)
    compressor.require_fits(
        store.recipe.encoder, store.recipe.dtype, store.recipe.code, what=f"the store {store.path}"
    )
    precision = "bfloat16" if config.encoder.precision == "bfloat16" else "float32"
    return LatentEncoder(compressor, store, precision)


def image_encoder(config: EncodeConfig) -> Encoder:
    """Return the image encoder that the settings name, on the CPU."""
    choice = config.encoder
    return create_encoder(
        choice.encoder,
        choice.weights,
        input_size=choice.input_size,
        model_args=choice.model_args(),
        layers=choice.layer_numbers(),
        combination=choice.combination,
    )


def run_worker(spec: WorkerSpec, report: Callable[[Event], None], encoder: RowEncoder | None = None) -> None:
    """Encode shards of an existing store until none is left for this worker.

    Args:
        spec: Which worker this is.
        report: Takes its news.
        encoder: The encoder, if it has been built already.

    Raises:
        IdentityMismatchError: If the weights found here are not the ones the store was begun with.
        UserError: If something outside the program stops the run.
    """
    config = spec.config
    writer = StoreWriter.open(config.store.out)
    execution = execution_of(writer.recipe, config)
    encoder = encoder or build_encoder(config)
    targets = open_targets(config, writer, encoder, spec.name)
    pending = partial(pending_in_any, [target.writer for target in targets])
    device = torch.device(spec.device)
    if device.type == "cuda":
        # What does not name a device means this one: events, streams, kernels compiled here.
        torch.cuda.set_device(device)
    encoder.to_device(device, writer.recipe.precision)
    if execution.compiled:
        encoder.compile_trunk()
    threads = decode_threads_for(config, spec.processes)
    report(WorkerStarted(spec.name, str(device), threads))
    store = config.store.out
    length = batch_length(writer.recipe.capacity, execution.batch_size)
    with (
        opened_rows(
            config,
            writer,
            {view for view, _ in pending()},
            length=length,
            threads=threads,
            pin_memory=device.type == "cuda",
        ) as rows,
        Leases(store, Owner.this_process(spec.name)) as leases,
    ):
        claims = Claims(
            pending,
            leases,
            Failures(store, config.work.max_attempts),
            rank=spec.rank,
            world_size=spec.world_size,
        )
        with Worker(
            encoder,
            targets,
            rows,
            claims,
            report,
            name=spec.name,
            length=length,
            most_shards=most_shards(spec, writer),
        ) as worker:
            if device.type == "cuda" or execution.compiled:
                worker.try_out(execution)
            worker.run()


@contextmanager
def opened_rows(
    config: EncodeConfig,
    writer: StoreWriter,
    views: AbstractSet[str],
    *,
    length: int,
    threads: int,
    pin_memory: bool,
) -> Iterator[RowBatches]:
    """Return the source of a store's rows: images, or the tokens of the store it is derived from."""
    if config.compressor is not None:
        images = writer.recipe.image_size > 0
        source = open_store(as_location(config.source_path()))
        yield StoredBatches(source, images=images, length=length, threads=threads, pin_memory=pin_memory)
        return
    with closing(crop_source(config, writer.recipe, views, writer.plan)) as crops:
        yield BatchDecoder(crops, length=length, threads=threads, pin_memory=pin_memory)
