"""`pipeline encode`: plan, encode every shard, finish the store; run again, it continues."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from pipeline.calibrate import calibrate, describe_error
from pipeline.claims import Failures
from pipeline.config import EncodeConfig
from pipeline.console import say
from pipeline.devices import named_devices, precision_for
from pipeline.encoders import Encoder
from pipeline.engines import slurm
from pipeline.engines.local import run_local
from pipeline.engines.ray import run_ray
from pipeline.engines.static import Place, place_from_environment, require_single_process
from pipeline.job import build_encoder, open_writer
from pipeline.leases import WORK_DIR, Leases, Owner
from pipeline.preflight import preflight
from pipeline.progress import Progress
from pipeline.retry import retry_quarantined
from pipeline.sources.labels import LabelTable
from pipeline.sources.listing import list_source
from shards.code_arrays import published_code
from shards.errors import IdentityMismatchError, UserError
from shards.finalize import read_commits
from shards.identity import Recipe
from shards.index import bad_rows
from shards.layout import MANIFEST, PLAN, ROOT
from shards.plan import Plan
from shards.quantize import Int8Code
from shards.root import read_recipe
from shards.store import Store
from shards.store import open_store as open_finished
from shards.writing import StoreWriter

_PIXELS_PER_TOKEN = 16
_NAMED_AT_MOST = 20
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
    if writer.pending():
        _encode_pending(config, writer, encoder, place)
    finish_once(config, writer)


def _dry_run(config: EncodeConfig) -> None:
    plan, encoder = make_plan(config), build_encoder(config)
    preflight(config, plan, make_recipe(config, plan, encoder), encoder)


def _retry(config: EncodeConfig) -> None:
    """Mends the rows that can be mended; the plan stays as it was, the mended images may have any size."""
    writer = open_writer(config.store.out)
    encoder = build_encoder(config)
    writer.recipe.encoder.require_same(encoder.identity, what="the encoder asked for")
    encoder.place(named_devices(config.work.devices)[0], writer.recipe.precision)
    retry_quarantined(writer, encoder)
    finish_once(config, writer)


def begin(config: EncodeConfig) -> tuple[StoreWriter, Encoder]:
    """Lists the source, builds the encoder, and begins or continues the store."""
    plan = make_plan(config)
    encoder = build_encoder(config)
    recipe = make_recipe(config, plan, encoder)
    code = None
    if recipe.dtype == "int8":
        code = _begun_code(config.store.out) or calibrate(config, plan, recipe, encoder)
        recipe = dataclasses.replace(recipe, code=code.digest)
    writer = open_store(config.store.out, recipe, plan, code)
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
    return open_writer(config.store.out)


def make_plan(config: EncodeConfig) -> Plan:
    """Lists the source and deals its images to the shards."""
    labels = LabelTable.read(config.labels) if config.labels else None
    listing = list_source(config.source_path(), labels)
    return Plan.build(listing.records, listing.class_names, config.store.shards, config.store.seed)


def make_recipe(config: EncodeConfig, plan: Plan, encoder: Encoder) -> Recipe:
    """What the store will hold."""
    store = config.store
    devices = named_devices(config.work.devices)
    image_size = store.image_size or _PIXELS_PER_TOKEN * encoder.identity.grid[0]
    return Recipe(
        encoder=encoder.identity,
        source_digest=plan.source_digest(),
        num_images=plan.num_images,
        num_shards=store.shards,
        seed=store.seed,
        views=store.view_names(),
        dtype=store.dtype,
        image_size=image_size,
        precision=precision_for(devices, config.encoder.precision),
        format=store.format,
        compression=None if store.compression == "none" else store.compression,
        calibration_rows=store.calibration_rows if store.dtype == "int8" else 0,
        code_error=store.code_error if store.dtype == "int8" else 0.0,
    )


def open_store(path: Path, recipe: Recipe, plan: Plan, code: Int8Code | None) -> StoreWriter:
    """Begins the store, or continues it if it was begun with the same recipe.

    Raises:
        IdentityMismatchError: Naming every difference, also which images have changed.
    """
    if (path / ROOT).exists() and (path / PLAN).exists():
        differences = read_recipe(path).diff(recipe)
        changed = changed_images(Plan.read(path / PLAN), plan)
        if differences:
            raise IdentityMismatchError(
                f"{path} was begun with another recipe: {'; '.join(differences + changed)}; "
                "give the settings it was begun with, or another --out"
            )
    return StoreWriter.create_or_continue(path, recipe, plan, code)


def changed_images(before: Plan, after: Plan) -> list[str]:
    """What has happened to the source between two listings, in a few words each."""
    old = dict(zip(before.keys, zip(before.nbytes, before.labels, strict=True), strict=True))
    new = dict(zip(after.keys, zip(after.nbytes, after.labels, strict=True), strict=True))
    kinds = {
        "are gone": sorted(old.keys() - new.keys()),
        "are new": sorted(new.keys() - old.keys()),
        "have another size or class": sorted(key for key in old.keys() & new.keys() if old[key] != new[key]),
    }
    return [f"{len(keys)} source images {what}, such as {keys[0]}" for what, keys in kinds.items() if keys]


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


def finish_once(config: EncodeConfig, writer: StoreWriter) -> None:
    """Finishes the store; of several workers one does it and the others wait for it."""
    manifest = writer.path / MANIFEST
    if manifest.exists():
        finish(config, writer)
        return
    with Leases(writer.path, Owner.this_process("finish")) as leases:
        while not leases.take("finish"):
            if manifest.exists():
                return
            time.sleep(0.5)
        finish(config, writer)


def finish(config: EncodeConfig, writer: StoreWriter) -> None:
    """Writes index, statistics and manifest once every shard is there, and says what the store holds.

    Raises:
        UserError: If shards are missing, or more images are bad than allowed.
    """
    if writer.pending():
        _refuse_unfinished(config, writer)
    commits = read_commits(writer.path, writer.recipe)
    reasons = bad_rows(writer.recipe, writer.plan, commits)
    _check_bad(config, writer.plan, reasons)
    writer.finalize({name: version(name) for name in ("torch", "timm", "numpy", "pillow")})
    shutil.rmtree(writer.path / WORK_DIR, ignore_errors=True)
    num_images, num_bad = writer.plan.num_images, len(reasons)
    say(
        f"{writer.path} is complete: {num_images - num_bad} of {num_images} images in "
        f"{writer.recipe.num_shards} shards, {num_bad} unusable"
    )
    _say_error(config, open_finished(writer.path))


def _say_error(config: EncodeConfig, finished: Store) -> None:
    """What int8 has cost, measured on every row."""
    for view in finished.views:
        error = finished.code_error(view)
        if error is None:
            return
        say(f"int8 {describe_error(error)}, in view {view}")
        over = int((~(error <= config.store.allow_error)).sum())
        if over:
            say(
                f"warning: {over} channels have lost more than --allow-error {config.store.allow_error:g}; "
                "`pipeline inspect` names them"
            )


def _check_bad(config: EncodeConfig, plan: Plan, reasons: dict[int, str]) -> None:
    key_of = dict(zip(plan.rows.tolist(), plan.keys, strict=True)) if reasons else {}
    for row in list(reasons)[:_NAMED_AT_MOST]:
        say(f"  unusable: {key_of[row]}: {reasons[row]}")
    if len(reasons) > _NAMED_AT_MOST:
        say(f"  … and {len(reasons) - _NAMED_AT_MOST} more")
    if len(reasons) > config.work.allowed_bad(plan.num_images):
        raise UserError(
            f"{len(reasons)} of {plan.num_images} images are unusable, more than --max-bad {config.work.max_bad}; "
            f"mend them and add --retry-quarantined, or allow them with --max-bad {len(reasons)}"
        )


def _refuse_unfinished(config: EncodeConfig, writer: StoreWriter) -> None:
    shards = {shard for _, shard in writer.pending()}
    parked = Failures(writer.path, config.work.max_attempts).parked()
    for shard, reason in parked.items():
        say(f"  shard {shard} failed {config.work.max_attempts} times: {reason}")
    raise UserError(
        f"{len(shards)} of {writer.recipe.num_shards} shards are not done ({len(parked)} of them failed too often); "
        "mend the cause and run the same command again"
    )
