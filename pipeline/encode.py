"""`pipeline encode`: plan, encode every shard, finish the store; run again, it continues."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.calibrate import calibrate
from pipeline.claims import Failures
from pipeline.config import EncodeConfig
from pipeline.console import say
from pipeline.devices import named_devices
from pipeline.encoders import Encoder
from pipeline.engines import slurm
from pipeline.engines.local import run_local
from pipeline.engines.ray import run_ray
from pipeline.engines.static import Place, place_from_environment, require_single_process
from pipeline.finish import finish_once
from pipeline.job import build_encoder
from pipeline.planning import given_statistics, make_plan, make_recipe, open_store
from pipeline.preflight import preflight
from pipeline.progress import Progress
from pipeline.retry import retry_quarantined
from shards.code_arrays import published_code
from shards.errors import UserError
from shards.given_statistics import publish_given
from shards.layout import ROOT
from shards.quantize import Int8Code
from shards.root import read_recipe
from shards.writing import StoreWriter

_AWAIT_SECONDS = 1800.0


def encode(config: EncodeConfig, arguments: Sequence[str]) -> None:
    """Encodes a source into a store, or continues.

    Args:
        config: What to do.
        arguments: The command's own arguments, for engines that run it elsewhere.

    Raises:
        UserError: If it cannot be done, or is not done completely.
    """
    config.check()
    if config.dry_run:
        _dry_run(config)
        return
    place = Place(0, 1, None)
    if config.work.engine == "local":
        require_single_process()
    elif config.work.engine == "static":
        place = place_from_environment()
    elif config.work.engine == "slurm":
        if not slurm.inside_array():
            script = slurm.array_script(config.work, arguments)
            if config.work.slurm_submit:
                say(slurm.submit(script))
            else:
                sys.stdout.write(script)
            return
        place = slurm.place_in_array()
    if config.retry_quarantined:
        _retry(config)
        return
    encoder: Encoder | None = None
    if place.rank == 0:
        writer, encoder = begin(config)
    else:
        writer = _await_store(config)
        publish_given(writer.path, given_statistics(config, writer.recipe))
    if writer.pending():
        _encode_pending(config, writer, encoder, place)
    finish_once(config, writer)


def _dry_run(config: EncodeConfig) -> None:
    plan, encoder = make_plan(config), build_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    given_statistics(config, recipe)
    preflight(config, plan, recipe, encoder)


def _retry(config: EncodeConfig) -> None:
    """Mends the rows that can be mended; the plan stays as it was, the mended images may have any size."""
    writer = StoreWriter.open(config.store.out)
    publish_given(writer.path, given_statistics(config, writer.recipe))
    encoder = build_encoder(config)
    writer.recipe.encoder.require_same(encoder.identity, what="the encoder asked for")
    encoder.place(named_devices(config.work.devices)[0], writer.recipe.precision)
    retry_quarantined(writer, encoder)
    finish_once(config, StoreWriter.open(config.store.out))


def begin(config: EncodeConfig) -> tuple[StoreWriter, Encoder]:
    """Lists the source, builds the encoder, and begins or continues the store."""
    plan = make_plan(config)
    encoder = build_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    given = given_statistics(config, recipe)
    code = None
    if recipe.dtype == "int8":
        code = _begun_code(config.store.out) or calibrate(config, plan, recipe, encoder)
        recipe = dataclasses.replace(recipe, code=code.digest)
    writer = open_store(config.store.out, recipe, plan, code)
    publish_given(writer.path, given)
    if encoder.identity.random_weights:
        say(
            f"warning: --weights {config.encoder.weights}: the encoder is NOT TRAINED; "
            "its tokens are for trying things out, not for results"
        )
    Failures(writer.path, config.work.max_attempts).clear()
    return writer, encoder


def _begun_code(path: Path) -> Int8Code | None:
    """The code a store was begun with: whoever continues it writes with the same one."""
    return published_code(path, read_recipe(path)) if (path / ROOT).exists() else None


def _await_store(config: EncodeConfig) -> StoreWriter:
    """The store, once the first worker has begun it."""
    deadline = time.monotonic() + _AWAIT_SECONDS
    while not (config.store.out / ROOT).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{config.store.out} was not begun within {_AWAIT_SECONDS:.0f} s; is the first worker running?"
            )
        time.sleep(0.5)
    return StoreWriter.open(config.store.out)


def _encode_pending(config: EncodeConfig, writer: StoreWriter, encoder: Encoder | None, place: Place) -> None:
    plan, pending = writer.plan, writer.pending()
    unfinished = {shard for _, shard in pending}
    if len(pending) < len(writer.recipe.views) * plan.num_shards and place.rank == 0:
        finished = plan.num_shards - len(unfinished)
        say(f"continuing {writer.path}: {finished} of {plan.num_shards} shards are there")
    devices = [str(device) for device in named_devices(config.work.devices)]
    if place.local_rank is not None:
        devices = [devices[place.local_rank % len(devices)]]
    with Progress(
        config.log_dir(), num_rows=plan.num_images, rows_done=lambda: _rows_done(writer), quiet=place.rank > 0
    ) as progress:
        if config.work.engine == "ray":
            run_ray(config, progress)
        else:
            run_local(config, devices, encoder, progress, machine=place.rank, machines=place.world_size)


def _rows_done(writer: StoreWriter) -> int:
    """Images of the shards that are finished in every view."""
    unfinished = {shard for _, shard in writer.pending()}
    return writer.plan.num_images - sum(writer.plan.shard_size(shard) for shard in unfinished)
