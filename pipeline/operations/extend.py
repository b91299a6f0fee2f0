"""`pipeline extend`: the images that a source has gained, in further shards of a store that is read meanwhile."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from pipeline.console import few, log
from pipeline.encode.execution import execution_of
from pipeline.encode.job import build_encoder
from pipeline.encode.planning import require_readable
from pipeline.encode.space import missing_nbytes, require_space
from pipeline.engines.running import find_world, run
from pipeline.operations.add_field import share_images
from pipeline.operations.add_view import encoder_of_store
from pipeline.operations.encode import warn_untrained
from pipeline.settings.additions import ExtendConfig
from pipeline.settings.config import EncodeConfig, EncoderConfig, StoreConfig
from pipeline.sources.crop_sources import named_roots
from pipeline.sources.known_roots import known_roots, remember_roots
from pipeline.sources.labels import LabelTable
from pipeline.sources.listing import Listing, list_source
from shards import (
    IdentityMismatchError,
    Plan,
    Recipe,
    StoreWriter,
    UsageError,
    as_location,
    is_store,
    open_store,
    require_output_folder,
)
from shards.metadata.layout import FIELDS, MANIFEST
from shards.storage.location import local_path
from shards.writing.revisions import begin_revision, publish_extended

_NAMED_AT_MOST = 3


def extend(config: ExtendConfig, arguments: Sequence[str]) -> None:
    """Encode the images whose keys the store does not have, in a new revision of it.

    An extension that was begun is finished with the images it was begun with.

    Args:
        config: What to do.
        arguments: The command's own arguments, for engines that run it elsewhere.

    Raises:
        UserError: If it cannot be done, or is not done completely.
    """
    begun = _begun(config)
    settings = _encode_settings(config, begun.recipe)
    settings.check()
    execution_of(begun.recipe, settings)
    world = find_world(config.work, arguments)
    if world is None:
        return
    under_way = not begun.finished()
    plan = begun.plan if under_way else _extended_plan(config, begun.plan)
    if under_way:
        log(
            f"finishing the extension of {config.store} that was begun; images that are new since come after it"
        )
    elif plan is begun.plan:
        log(f"{config.store} has every image of {config.source} already")
        begun.finalize()  # tells readers of zarr what there is, should an earlier command have been killed before that
        _name_fields_behind(config)
        return
    recipe = dataclasses.replace(begun.recipe, **plan.recipe_values())
    encoder = build_encoder(settings)
    recipe.encoder.require_same(encoder.identity, what="the encoder asked for")
    require_readable(settings, recipe, plan, recipe.views)
    require_space(config.store, missing_nbytes(config.store, recipe, plan))
    if publish_extended(config.store, recipe, plan) != plan:
        raise IdentityMismatchError(
            f"an extension of {config.store} by the same images at other places was begun; give the source by the path "
            "it was begun with, or give it up with `pipeline clean --give-up`"
        )
    begin_revision(config.store, recipe)
    remember_roots(config.store, named_roots(settings))
    if is_store(config.source) and recipe.image_size:
        share_images(open_store(config.source), config.store)
    warn_untrained(encoder)
    run(settings, StoreWriter.open(config.store), encoder, world)
    _name_fields_behind(config)


def _begun(config: ExtendConfig) -> StoreWriter:
    """Return the store with its newest revision, if that is finished or an extension.

    Raises:
        UserError: If there is no store, or it or another addition to it is to be finished first.
    """
    folder = local_path(config.store)
    if folder is not None:
        require_output_folder(folder)
    writer = StoreWriter.open(config.store)
    if not writer.recipe.earlier and not (config.store / MANIFEST).exists():
        open_store(config.store)  # says that it is not finished
    if not writer.finished() and (config.store / MANIFEST).exists():
        published = open_store(config.store).recipe
        if published.views != writer.recipe.views:
            raise IdentityMismatchError(
                f"{config.store} is being given the views {', '.join(writer.recipe.views)}; finish that first, or "
                "give it up with `pipeline clean --give-up`"
            )
    compressed = writer.recipe.encoder.compressor is not None
    if compressed != (config.compressor is not None):
        raise UsageError(
            f"{config.store} is a derived field: give the snapshot it was made with as --compressor"
            if compressed
            else f"{config.store} is not a derived field; leave out --compressor"
        )
    return writer


def _encode_settings(config: ExtendConfig, recipe: Recipe) -> EncodeConfig:
    """Return the settings of an encode of the source into the store."""
    if config.compressor is not None:
        encoder = EncoderConfig(precision="bfloat16" if recipe.precision == "bfloat16" else "float32")
    else:
        encoder = encoder_of_store(config, recipe)
    roots = (*config.reading.roots, *known_roots(config.store))
    if is_store(config.source):
        roots += known_roots(as_location(config.source))
    settings = EncodeConfig(
        source=config.source,
        reading=dataclasses.replace(config.reading, roots=roots),
        encoder=encoder,
        compressor=config.compressor,
        store=StoreConfig(out=config.store, shards=recipe.num_shards, allow_error=config.allow_error),
        work=config.work,
    )
    if config.store.parent.name != FIELDS:
        return settings
    # Beside the outer store, not inside it beside the field.
    outer = dataclasses.replace(
        settings, store=dataclasses.replace(settings.store, out=config.store.parent.parent)
    )
    return dataclasses.replace(settings, work=dataclasses.replace(config.work, log_dir=outer.log_dir()))


def _extended_plan(config: ExtendConfig, plan: Plan) -> Plan:
    """Return the plan with what is new in the source; the plan itself if nothing is."""
    if config.store.parent.name == FIELDS:
        _require_outer_store(config)
    if is_store(config.source):
        return _plan_of_outer_store(config, plan)
    labels = None if config.labels is None else LabelTable.read(config.labels)
    listing = list_source(config.source, labels, config.reading.options(), known=plan, kept=plan.class_names)
    new = _new_images(config, plan, listing)
    if not new.records:
        return plan
    class_names = new.class_names or plan.class_names
    further = class_names[len(plan.class_names) :]
    log(
        f"{len(new.records)} new images"
        + (f" and {len(further)} new classes: {few(further, _NAMED_AT_MOST)}" if further else "")
    )
    return plan.extended(new.records, class_names, new.archives)


def _require_outer_store(config: ExtendConfig) -> None:
    """Refuse to give a field other rows than the store it is a field of has.

    Raises:
        UsageError: The source is not that store, nor a copy of its rows.
    """
    outer = config.store.parent.parent
    if not is_store(config.source) or open_store(config.source).plan != open_store(outer).plan:
        raise UsageError(
            f"{config.store} is a field of {outer} and has its rows; extend {outer} by new images, and the field by "
            f"{outer}: `{open_store(config.store).catch_up_command}`"
        )


def _plan_of_outer_store(config: ExtendConfig, plan: Plan) -> Plan:
    """Return the plan of the store that a field belongs to, and lags behind."""
    if config.labels is not None:
        raise UsageError(f"--labels are for files; the store {config.source} names its own classes")
    whole = open_store(config.source)
    extended = whole.plan.with_repaired(whole.repaired)
    stage = len(plan.earlier)
    if stage > len(extended.earlier) or extended.at_stage(stage) != plan:
        raise UsageError(
            f"{config.source} is a store of other rows than {config.store}, which is extended by image files, or, as a "
            "field, by the store it is a field of; `pipeline merge` puts the rows of two stores into one"
        )
    return plan if stage == len(extended.earlier) else extended


def _new_images(config: ExtendConfig, plan: Plan, listing: Listing) -> Listing:
    """Return the images that the store lacks; print what else differs between it and its source.

    Raises:
        UsageError: If an archive that holds new images was packed again, so that old ones are elsewhere in it.
    """
    found = {record.key: record for record in listing.records}
    listed = dict(zip(plan.keys, plan.table["nbytes"].to_pylist(), strict=True))
    kept = {record.key: record for record in plan.records(np.arange(plan.num_images))}
    both = [(kept[key], record) for key, record in found.items() if key in kept]
    changed = [
        now.key
        for was, now in both
        if now.nbytes not in (was.nbytes, listed[now.key]) or now.label != was.label
    ]
    if both:
        gone = kept.keys() - found.keys()
        _name(f"images of {config.store} are gone from the source, and stay in the store", gone)
    else:
        log(f"{config.source} holds new images alone; the {len(kept)} that {config.store} has stay")
    _name("images have another size or class than before; the store keeps them as they were encoded", changed)
    new = [record for record in listing.records if record.key not in kept]
    grown = {record.uri for record in new} & plan.archives.keys()
    for was, now in both:
        if was.uri in grown and (was.uri, was.offset) != (now.uri, now.offset):
            raise UsageError(
                f"{was.uri} was packed again since {config.store} was made, {was.key} is elsewhere in it now; put "
                "new images into further files, and bring the old one back"
            )
    return dataclasses.replace(listing, records=new)


def _name(what: str, keys: Collection[str]) -> None:
    if keys:
        log(f"{len(keys)} {what}: {few(sorted(keys), _NAMED_AT_MOST)}")


def _name_fields_behind(config: ExtendConfig) -> None:
    """Print which fields lack rows of the store, and the commands that add them."""
    store = open_store(config.store)
    for name in store.manifest.fields:
        field = open_store(config.store / FIELDS / name)
        lacking = store.recipe.num_images - field.recipe.num_images
        if lacking > 0:
            log(f"field {name} is behind by {lacking} images; `{field.catch_up_command}` catches up")
