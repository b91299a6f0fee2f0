"""`pipeline encode`: plan, encode every shard, finish the store; run again, it continues."""

import dataclasses
import time
from collections.abc import Sequence

from pipeline.console import log
from pipeline.encode.calibrate import calibrate
from pipeline.encode.execution import choose_execution
from pipeline.encode.job import build_encoder, image_encoder
from pipeline.encode.leases import Leases, Owner, remove_if_empty, require_nobody_at_work
from pipeline.encode.planning import (
    begin_or_continue,
    given_statistics,
    make_plan,
    make_recipe,
    require_readable,
)
from pipeline.encode.preflight import preflight
from pipeline.encode.retry import withdraw_quarantined
from pipeline.encode.targets import companion_encoders, companion_paths, open_targets
from pipeline.encoders.frozen import Encoder
from pipeline.encoders.latents import RowEncoder
from pipeline.engines.running import find_world, run
from pipeline.engines.static import World
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import named_roots, with_known_roots
from pipeline.sources.known_roots import remember_roots
from shards import (
    Int8Code,
    Location,
    Plan,
    Recipe,
    StoreWriter,
    UserError,
    publish_given,
    published_code,
    require_output_folder,
)
from shards.metadata.layout import ROOT, WORK_DIR
from shards.metadata.root import read_recipe
from shards.storage.location import local_path
from shards.writing.added_fields import why_not_linked

_AWAIT_SECONDS = 1800.0
_RETRY = "retry"
_WATCH_SECONDS = 12.0
"""How long leases of other machines are watched for a sign of life."""


def encode(config: EncodeConfig, arguments: Sequence[str]) -> None:
    """Encode a source into a store, or continue.

    Args:
        config: What to do.
        arguments: The command's own arguments, for engines that run it elsewhere.

    Raises:
        UserError: If it cannot be done, or is not done completely.
    """
    config.check()
    folder = local_path(config.store.out)
    if folder is not None and not config.dry_run:
        require_output_folder(folder)
    config = with_known_roots(config)
    if config.dry_run:
        _dry_run(config)
        return
    world = find_world(config.work, arguments)
    if world is None:
        return
    if config.retry_quarantined:
        _retry(config, world)
        return
    writer, encoder = begin_or_await(config, world)
    run(config, writer, encoder, world)


def _dry_run(config: EncodeConfig) -> None:
    found: list[str] = []
    plan, encoder = make_plan(config, found.append), image_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    given_statistics(config, recipe)
    for line in found:
        log(line)
    preflight(config, plan, recipe, encoder)


def _retry(config: EncodeConfig, world: World) -> None:
    """Withdraw the shards of images that can be decoded now, and encode them again as any shards of the plan.

    The plan stays as it was: repaired images may have any size. One process does it: the first of several equal ones,
    and of several commands one after the other. The command without `--retry-quarantined` may join it as it encodes.
    """
    if world.rank > 0:
        log(f"rank {world.rank} has nothing to do: rank 0 retries the quarantined images alone")
        return
    path = config.store.out
    writer = StoreWriter.open(path)  # refuses what is no store
    encoder = build_encoder(config)
    targets = open_targets(config, writer, encoder, "this command")
    publish_given(path, given_statistics(config, writer.recipe))
    with Leases(path, Owner.this_process("retry")) as leases:
        while not leases.take(_RETRY):
            time.sleep(0.5)
        require_nobody_at_work(path, _WATCH_SECONDS, what="retried", own=_RETRY)
        for target in targets:
            withdraw_quarantined(config, StoreWriter.open(target.writer.path))
        run(config, StoreWriter.open(path), encoder, world)
    remove_if_empty(path / WORK_DIR)  # the lease made it again


def begin_or_await(config: EncodeConfig, world: World) -> tuple[StoreWriter, RowEncoder | None]:
    """Begin or continue the store, or wait until the first of equal workers has done so."""
    if world.rank == 0:
        return begin(config)
    writer = _await_store(config)
    publish_given(writer.path, given_statistics(config, writer.recipe))
    return writer, None


def begin(config: EncodeConfig) -> tuple[StoreWriter, RowEncoder]:
    """List the source, build the encoder, and begin or continue the store."""
    found: list[str] = []
    plan = make_plan(config, found.append)
    encoder = build_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    recipe = dataclasses.replace(recipe, execution=choose_execution(config, recipe, encoder))
    given = given_statistics(config, recipe)
    companions = companion_encoders(config, encoder)
    require_readable(config, recipe, plan, recipe.views)
    writer = _begin_store(config, config.store.out, recipe, plan, encoder)
    remember_roots(writer.path, named_roots(config))
    for name, path in companion_paths(config).items():
        companion = companions[name]
        _begin_store(config, path, dataclasses.replace(recipe, encoder=companion.identity), plan, companion)
        reason = why_not_linked(writer.path, recipe, path)
        if recipe.image_size and reason is not None:
            log(f"the images are stored once more in {path}: {reason}")
    publish_given(writer.path, given)
    for line in found:
        log(line)
    warn_untrained(encoder)
    return writer, encoder


def _begin_store(
    config: EncodeConfig, path: Location, recipe: Recipe, plan: Plan, encoder: RowEncoder
) -> StoreWriter:
    code = None
    if recipe.dtype == "int8":
        assert isinstance(encoder, Encoder), "derived fields are not stored as int8"
        code = _begun_code(path) or calibrate(config, plan, recipe, encoder)
        recipe = dataclasses.replace(recipe, code=code.digest)
    return begin_or_continue(path, recipe, plan, code)


def warn_untrained(encoder: RowEncoder) -> None:
    """Print a warning if the encoder was never trained: its tokens are of use only to try things out."""
    if encoder.identity.random_weights:
        log(
            f"warning: --weights {encoder.identity.weights}: the encoder is NOT TRAINED; "
            "its tokens are for trying things out, not for results"
        )


def _begun_code(path: Location) -> Int8Code | None:
    """Return the code a store was begun with: whoever continues it writes with the same one."""
    return published_code(path, read_recipe(path)) if (path / ROOT).exists() else None


def _await_store(config: EncodeConfig) -> StoreWriter:
    """Return the store, once the first worker has begun it."""
    deadline = time.monotonic() + _AWAIT_SECONDS
    while not all((path / ROOT).exists() for path in (config.store.out, *companion_paths(config).values())):
        if time.monotonic() > deadline:
            raise UserError(
                f"{config.store.out} was not begun within {_AWAIT_SECONDS:.0f} s; is the first worker running?"
            )
        time.sleep(0.5)
    return StoreWriter.open(config.store.out)
