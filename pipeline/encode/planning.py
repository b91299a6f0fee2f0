"""The beginning of an encode: which images go where, what the store will hold, and whether it may be continued."""

from collections.abc import Callable, Collection

import numpy as np

from pipeline.console import few, log
from pipeline.encode.devices import named_devices, precision_for
from pipeline.encode.statistics_file import read_statistics
from pipeline.encoders.latents import RowEncoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import holds_crops, named_roots
from pipeline.sources.crops import default_crop
from pipeline.sources.labels import LabelTable
from pipeline.sources.listing import list_source
from shards import (
    GivenStatistics,
    IdentityMismatchError,
    Int8Code,
    Location,
    Plan,
    Recipe,
    SourceReader,
    SourceRoots,
    StoreWriter,
    UsageError,
    as_location,
    continued_plan,
    is_store,
    open_store,
)
from shards.metadata.layout import PLAN, ROOT, plan_path
from shards.metadata.root import read_recipe
from shards.writing.added_fields import field_path
from shards.writing.revisions import current_revision, newest_revision
from shards.writing.selection import Part

_FOLLOWS_FROM_IMAGES = ("source_digest ", "num_images ")
_SOURCE_REMEDY = (
    "bring the source back as it was, or give another --out; images that are new are added with "
    "`pipeline extend STORE SOURCE`, once the store is finished"
)


def make_plan(config: EncodeConfig, tell: Callable[[str], object] = log) -> Plan:
    """List the source and assign its images to shards; a store as source keeps its own rows and keys.

    The plan of a store that was begun stands if nothing has changed since but images that were repaired.

    Args:
        config: Names source and store.
        tell: Takes lines about what was found and what was left out.
    """
    out, listing = config.store.out, _listed(config, tell)
    if not is_store(out):  # killed at its very beginning it has a plan, and nothing has been repaired since
        return listing
    return continued_plan(out, listing, read_recipe(out, newest_revision(out)))


def _listed(config: EncodeConfig, tell: Callable[[str], object]) -> Plan:
    """Return the plan that the source gives a new store."""
    if is_store(config.source_path()):
        return _store_plan(config)
    labels = LabelTable.read(config.labels) if config.labels else None
    listing = list_source(
        config.source_path(), labels, config.reading.options(), known=_begun(config), tell=tell
    )
    return Plan.build(
        listing.records, listing.class_names, config.store.shards, config.store.seed, listing.archives
    )


def _begun(config: EncodeConfig) -> Plan | None:
    """Return the plan of the store that is continued, if it was begun."""
    out = config.store.out
    if is_store(out):
        return Plan.read(out / plan_path(read_recipe(out, newest_revision(out))))
    return Plan.read(out / PLAN) if (out / PLAN).exists() else None


def _store_plan(config: EncodeConfig) -> Plan:
    if config.labels is not None:
        raise UsageError(f"--labels are for files; the store {config.source_path()} names its own classes")
    source = open_store(as_location(config.source_path()))
    if source.recipe.earlier and config.store.out == field_path(source.path, config.store.out.name):
        return source.plan.with_repaired(source.repaired)  # its images and seed do not give this order
    part = Part(source, np.arange(source.plan.num_images))
    plan = Plan.build(
        part.records(), source.class_names, config.store.shards, config.store.seed, source.plan.archives
    )
    return plan.with_repaired(source.repaired)


def require_readable(config: EncodeConfig, recipe: Recipe, plan: Plan, views: Collection[str]) -> None:
    """Refuse, before anything is written, a plan whose images are all outside the places that may be read.

    Of a plan some of whose images are elsewhere, those become rows that are unusable, each with the reason.

    Raises:
        UsageError: Naming where they are, and the option that allows it.
        UserError: If a parquet file was rewritten since it was listed.
    """
    if config.compressor is not None or not is_store(config.source_path()):
        return
    store = open_store(as_location(config.source_path()))
    if holds_crops(store, recipe, views):
        return
    roots = SourceRoots.of(named_roots(config))
    with SourceReader(plan.archives, roots) as reader:
        reader.require_same_rows()
    places = plan.uris.tolist()
    if not any(roots.hold(place) for place in places):
        folder = places[0].rpartition("/")[0]
        raise UsageError(
            f"{config.source_path()} was not made on this machine, and its plan says that its images are "
            "elsewhere, such as "
            f"in {folder}; name where they may be read with --source PLACE"
        )


def make_recipe(config: EncodeConfig, plan: Plan, encoder: RowEncoder) -> Recipe:
    """Return the recipe of the new store.

    Raises:
        UsageError: If class tokens are asked for, and the encoder has none.
    """
    store = config.store
    if store.class_token:
        encoder.require_class_token()
    devices = named_devices(config.work.devices)
    image_size = _default_image_size(config, encoder) if store.image_size is None else store.image_size
    return Recipe(
        encoder=encoder.identity,
        source_digest=plan.source_digest(),
        num_images=plan.num_images,
        num_shards=plan.num_shards,
        seed=store.seed,
        views=store.view_names(),
        dtype=store.dtype,
        image_size=image_size,
        precision=precision_for(devices, config.encoder.precision),
        format=store.format,
        compression=None if store.compression == "none" else store.compression,
        image_compression=None if store.image_compression == "none" else store.image_compression,
        calibration_rows=store.calibration_rows if store.dtype == "int8" else 0,
        code_error=store.code_error if store.dtype == "int8" else 0.0,
        class_token=store.class_token,
        earlier=plan.earlier,
    )


def _default_image_size(config: EncodeConfig, encoder: RowEncoder) -> int:
    """Return the side of the stored crops: a store's where they come from a store, else what fits the encoder."""
    stored = 0
    if is_store(config.source_path()):
        stored = open_store(as_location(config.source_path())).image_size
    return stored or default_crop(encoder.identity)


def given_statistics(config: EncodeConfig, recipe: Recipe) -> GivenStatistics | None:
    """Return the statistics of `--stats-from`, which fit the tokens of `recipe`; None if it is not used."""
    if config.store.stats_from is None:
        return None
    return read_statistics(config.store.stats_from, (recipe.encoder.width, *recipe.encoder.grid))


def begin_or_continue(path: Location, recipe: Recipe, plan: Plan, code: Int8Code | None) -> StoreWriter:
    """Begin the store, or continue it if it was begun with the same recipe.

    Raises:
        IdentityMismatchError: Naming every difference, also which images have changed.
    """
    if (path / ROOT).exists() and (path / PLAN).exists():
        differences = read_recipe(path).diff(recipe)
        if differences and read_recipe(path, current_revision(path)).diff(recipe):
            present = read_recipe(path, current_revision(path))
            changed = changed_images(Plan.read(path / plan_path(present)), plan)
            # What follows from the images alone says nothing that these lines do not.
            settings = [d for d in differences if not (changed and d.startswith(_FOLLOWS_FROM_IMAGES))]
            raise IdentityMismatchError(
                f"{path} was begun with another recipe: {'; '.join(settings + changed)}; "
                + (_SOURCE_REMEDY if changed else "give the settings it was begun with, or another --out")
            )
    return StoreWriter.create_or_continue(path, recipe, plan, code)


def changed_images(before: Plan, after: Plan) -> list[str]:
    """Describe the changes of a source between two listings, in a few words each."""
    old = dict(zip(before.keys, zip(before.nbytes, before.labels, strict=True), strict=True))
    new = dict(zip(after.keys, zip(after.nbytes, after.labels, strict=True), strict=True))
    kinds = {
        "are gone": sorted(old.keys() - new.keys()),
        "are new": sorted(new.keys() - old.keys()),
        "have another size or class": sorted(key for key in old.keys() & new.keys() if old[key] != new[key]),
    }
    lines = [f"{len(keys)} source images {what}, such as {keys[0]}" for what, keys in kinds.items() if keys]
    if before.class_names != after.class_names:
        before_names, after_names = (few(plan.class_names, 5) or "none" for plan in (before, after))
        lines.append(f"classes were {before_names} and are {after_names}")
    return lines
