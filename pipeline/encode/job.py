"""A worker from nothing but its settings: what every engine starts, in its own process or another."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from pipeline.encode.claims import Claims, Failures
from pipeline.encode.leases import Leases, Owner
from pipeline.encode.progress import Event, WorkerStarted
from pipeline.encode.worker import Worker
from pipeline.encoders.encoder import Encoder, create_encoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.picture_sources import picture_source
from shards import StoreWriter, usable_cores


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


def build_encoder(config: EncodeConfig) -> Encoder:
    """The encoder that the settings name, on the CPU."""
    choice = config.encoder
    return create_encoder(
        choice.encoder,
        choice.weights,
        input_size=choice.input_size,
        model_args=choice.model_args(),
        layers=choice.layer_numbers(),
        combination=choice.combination,
    )


def run_worker(spec: WorkerSpec, report: Callable[[Event], None], encoder: Encoder | None = None) -> None:
    """Encodes shards of a store that exists until none is left for this worker.

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
    encoder = encoder or build_encoder(config)
    writer.recipe.encoder.require_same(encoder.identity, what=f"the encoder built by {spec.name}")
    device = torch.device(spec.device)
    if device.type == "cuda":
        # What does not name a device means this one: events, streams, kernels compiled here.
        torch.cuda.set_device(device)
    encoder.to_device(device, writer.recipe.precision)
    if config.encoder.compile:
        encoder.compile_trunk()
    decode_threads = decode_threads_for(config, spec.processes)
    report(WorkerStarted(spec.name, str(device), decode_threads))
    store = config.store.out
    views = {view for view, _ in writer.pending()}
    with (
        closing(picture_source(config.source_path(), writer.recipe, views)) as source,
        Leases(store, Owner.this_process(spec.name)) as leases,
    ):
        claims = Claims(
            writer.pending,
            leases,
            Failures(store, config.work.max_attempts),
            rank=spec.rank,
            world_size=spec.world_size,
        )
        with Worker(
            encoder,
            writer,
            source,
            claims,
            report,
            name=spec.name,
            batch_size=config.work.batch_size,
            decode_threads=decode_threads,
        ) as worker:
            worker.run()
