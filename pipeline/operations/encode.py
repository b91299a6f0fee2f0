"""`pipeline encode`: plan, encode every shard, finish the store; run again, it continues."""

import dataclasses
import time
from collections.abc import Sequence

from pipeline.console import say
from pipeline.encode.calibrate import calibrate
from pipeline.encode.devices import named_devices
from pipeline.encode.finish import finish_once
from pipeline.encode.job import build_encoder
from pipeline.encode.leases import Leases, Owner
from pipeline.encode.planning import given_statistics, make_plan, make_recipe, open_store
from pipeline.encode.preflight import preflight
from pipeline.encode.retry import retry_quarantined
from pipeline.encoders.encoder import Encoder
from pipeline.engines.running import find_place, run
from pipeline.engines.static import Place
from pipeline.settings.config import EncodeConfig
from shards import Int8Code, Location, StoreWriter, UserError, publish_given, published_code
from shards.metadata.layout import ROOT
from shards.metadata.root import read_recipe

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
    place = find_place(config.work, arguments)
    if place is None:
        return
    if config.retry_quarantined:
        _retry(config, place)
        return
    writer, encoder = begin_or_await(config, place)
    run(config, writer, encoder, place)


def _dry_run(config: EncodeConfig) -> None:
    plan, encoder = make_plan(config), build_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    given_statistics(config, recipe)
    preflight(config, plan, recipe, encoder)


def _retry(config: EncodeConfig, place: Place) -> None:
    """Mends the rows that can be mended; the plan stays as it was, the mended images may have any size.

    One process does it: the first of several equal ones, and of several commands one after the other.
    """
    if place.rank > 0:
        say(f"rank {place.rank} has nothing to do: rank 0 retries the quarantined images alone")
        return
    StoreWriter.open(config.store.out)  # refuses what is no store
    encoder = build_encoder(config)
    with Leases(config.store.out, Owner.this_process("retry")) as leases:
        while not leases.take("retry"):
            time.sleep(0.5)
        writer = StoreWriter.open(config.store.out)
        publish_given(writer.path, given_statistics(config, writer.recipe))
        writer.recipe.encoder.require_same(encoder.identity, what="the encoder asked for")
        encoder.place(named_devices(config.work.devices)[0], writer.recipe.precision)
        retry_quarantined(writer, encoder)
        finish_once(config, StoreWriter.open(config.store.out))


def begin_or_await(config: EncodeConfig, place: Place) -> tuple[StoreWriter, Encoder | None]:
    """Begins or continues the store, or waits until the first of equal workers has done so."""
    if place.rank == 0:
        return begin(config)
    writer = _await_store(config)
    publish_given(writer.path, given_statistics(config, writer.recipe))
    return writer, None


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
    warn_untrained(encoder)
    return writer, encoder


def warn_untrained(encoder: Encoder) -> None:
    """Says aloud that tokens will be of no use but for trying things out, if that is so."""
    if encoder.identity.random_weights:
        say(
            f"warning: --weights {encoder.identity.weights}: the encoder is NOT TRAINED; "
            "its tokens are for trying things out, not for results"
        )


def _begun_code(path: Location) -> Int8Code | None:
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
