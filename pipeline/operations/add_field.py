"""`pipeline add-field`: a finished store's rows in other words, as a store of its own in the store.

Another encoder sees the store's images; a compressor is given the store's tokens and never sees an image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from pipeline.console import log
from pipeline.encode.finish import list_fields
from pipeline.encode.space import missing_nbytes, require_space
from pipeline.engines.running import find_world, run
from pipeline.operations.encode import begin_or_await
from pipeline.settings.additions import AddFieldConfig
from pipeline.settings.config import EncodeConfig, EncoderConfig, SourceConfig, StoreConfig
from pipeline.sources.known_roots import known_roots
from shards import IdentityMismatchError, Location, Store, UsageError, open_store
from shards.storage.location import require_own_files
from shards.writing.added_fields import can_link_images, field_path, link_images


def add_field(config: AddFieldConfig, arguments: Sequence[str]) -> None:
    """Add a field: same rows, shards, seed and views, so the same order and draws.

    Args:
        config: What to do.
        arguments: The command's own arguments, for engines that run it elsewhere.

    Raises:
        UserError: If it cannot be done, or is not done completely.
    """
    store = open_store(config.store)
    if not (config.name.isidentifier() and config.name.isascii()):
        raise UsageError(f"--name must be a plain word, got {config.name!r}; such as siglip2")
    if config.compressor is not None:
        _check_compressor(config, store, arguments)
    settings = _encode_settings(config, store)
    settings.check()
    world = find_world(config.work, arguments)
    if world is None:
        return
    field = settings.store.out
    require_own_files(store.path)
    try:
        writer, encoder = begin_or_await(settings, world)
    except IdentityMismatchError as error:
        raise IdentityMismatchError(str(error).replace("another --out", "another --name")) from error
    if writer.plan != store.plan:
        raise IdentityMismatchError(
            f"the rows of {store.path} are not in the order that its images and seed give, so {config.name} cannot "
            "have the same; make a `pipeline reshard` of it first"
        )
    shared = writer.recipe.image_size > 0 and share_images(store, field)
    names = ("tokens", "cls") if shared else ("tokens", "cls", "image")
    require_space(field, missing_nbytes(field, writer.recipe, writer.plan, names))
    run(settings, writer, encoder, world)
    list_fields(store.path)
    lost = store.manifest.num_valid - open_store(field).manifest.num_valid
    log(
        f"{field} is a store of the rows of {store.path}"
        + (f"; {lost} of them could not be encoded" if lost > 0 else "")
    )


def _encode_settings(config: AddFieldConfig, store: Store) -> EncodeConfig:
    """Return the settings of an encode with the store as its source."""
    recipe = store.recipe
    encoder, image_size = config.encoder, recipe.image_size
    if config.compressor is not None:
        if encoder.precision == "auto":
            encoder = dataclasses.replace(encoder, precision="float32")
        image_size = image_size if _can_share(store) else 0
    settings = EncodeConfig(
        source=str(config.store),
        reading=SourceConfig(roots=(*config.roots, *known_roots(config.store))),
        encoder=encoder,
        compressor=config.compressor,
        store=StoreConfig(
            out=field_path(config.store, config.name),
            shards=recipe.num_shards,
            views=",".join(recipe.views),
            dtype=config.dtype,
            image_size=image_size,
            format=cast("Any", recipe.format),
            compression=cast("Any", recipe.compression or "none"),
            image_compression=cast("Any", recipe.image_compression or "none"),
            seed=recipe.seed,
            class_token=config.class_token,
            calibration_rows=config.calibration_rows,
            code_error=config.code_error,
            allow_error=config.allow_error,
        ),
        work=config.work,
    )
    # Beside the store, not inside it beside the field.
    outer = dataclasses.replace(settings, store=dataclasses.replace(settings.store, out=config.store))
    return dataclasses.replace(settings, work=dataclasses.replace(config.work, log_dir=outer.log_dir()))


def _check_compressor(config: AddFieldConfig, store: Store, arguments: Sequence[str]) -> None:
    """Refuse settings that exclude a compressor, and a compressor that must not be used.

    Raises:
        UserError: Naming the option, or what is wrong with the compressor.
    """
    from train.weights.compressor import load_compressor

    encoder_options = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(EncoderConfig)}
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    excluded = sorted(given & encoder_options - {"--precision", "--compile"})
    if excluded:
        raise UsageError(
            f"--compressor makes latents of the tokens that {store.path} holds, so no encoder is loaded: "
            f"leave out {' '.join(excluded)}"
        )
    if store.recipe.encoder.compressor is not None:
        raise UsageError(
            f"{store.path} holds latents of a compressor already; give the store that it was derived from"
        )
    if config.dtype == "int8":
        raise UsageError(
            "latents of a compressor are not stored as int8, whose code has one table a channel for all places and is "
            "fitted to images through an encoder; leave --dtype at float16, the latents are small"
        )
    assert config.compressor is not None
    compressor = load_compressor(config.compressor, decoders=True)
    if compressor.untrained and not config.untrained:
        raise UsageError(
            f"{config.compressor} has not been trained a single step, its latents mean nothing; train it with "
            "train/compressor.py, or insist with --untrained"
        )


def _can_share(store: Store) -> bool:
    """Return whether a derived field can have the store's images without a copy; it has none otherwise, and says so."""
    if store.image_size == 0 or can_link_images(store):
        return True
    log(
        f"the field holds no images, which cannot be linked from {store.path}; whatever needs them reads the store's"
    )
    return False


def share_images(store: Store, field: Location) -> bool:
    """Link the store's images into the field; print a line where they cannot be linked."""
    reason = link_images(store, field)
    if reason is not None:
        log(f"the images are stored a second time in {field}: {reason}")
    return reason is None
