"""`pipeline add-view`: further views of a finished store, beside what is there."""

import dataclasses
from collections.abc import Sequence

from pipeline.console import log
from pipeline.encode.execution import execution_of
from pipeline.encode.job import build_encoder
from pipeline.encode.planning import require_readable
from pipeline.encode.space import missing_nbytes, require_space
from pipeline.engines.running import find_world, run
from pipeline.operations.encode import warn_untrained
from pipeline.settings.additions import AddViewConfig, ExtendConfig
from pipeline.settings.config import EncodeConfig, EncoderConfig, SourceConfig, StoreConfig
from pipeline.sources.known_roots import known_roots
from shards import EncoderIdentity, Recipe, Store, StoreWriter, UsageError, open_store
from shards.writing.revisions import begin_revision


def add_view(config: AddViewConfig, arguments: Sequence[str]) -> None:
    """Encode the views that the store lacks, in a new revision of it.

    Args:
        config: What to do.
        arguments: The command's own arguments, for engines that run it elsewhere.

    Raises:
        UserError: If the encoder is not the store's, or it cannot be done, or is not done completely.
    """
    before = open_store(config.store)
    if before.recipe.encoder.compressor is not None:
        raise UsageError(
            f"{config.store} holds latents made of another store's tokens; add the views to that store, then make the "
            "field again with `pipeline add-field` under another --name"
        )
    missing = tuple(view for view in config.view_names() if view not in before.views)
    if not missing:
        log(f"{config.store} has the views {', '.join(before.views)} already")
        return
    world = find_world(config.work, arguments)
    if world is None:
        return
    recipe = dataclasses.replace(before.recipe, views=(*before.views, *missing))
    settings = _encode_settings(config, before.recipe)
    settings.check()
    execution_of(before.recipe, settings)
    encoder = build_encoder(settings)
    before.recipe.encoder.require_same(encoder.identity, what="the encoder asked for")
    require_readable(settings, recipe, before.plan, missing)
    require_space(config.store, missing_nbytes(config.store, recipe, before.plan))
    begin_revision(config.store, recipe)
    warn_untrained(encoder)
    run(settings, StoreWriter.open(config.store), encoder, world)
    _log_bad(before, open_store(config.store))


def _encode_settings(config: AddViewConfig, recipe: Recipe) -> EncodeConfig:
    """Return the settings of an encode with the store itself as its source."""
    return EncodeConfig(
        source=str(config.store),
        reading=SourceConfig(roots=(*config.roots, *known_roots(config.store))),
        encoder=encoder_of_store(config, recipe),
        store=StoreConfig(out=config.store, shards=recipe.num_shards, allow_error=config.allow_error),
        work=config.work,
    )


def encoder_of_store(config: AddViewConfig | ExtendConfig, recipe: Recipe) -> EncoderConfig:
    """Return the encoder of a store, as far as the settings name no other.

    Raises:
        UsageError: If its weights came from a file that they do not name.
    """
    name, model_args = _named_model(recipe.encoder)
    weights = config.weights or recipe.encoder.weights
    if weights == "file":
        raise UsageError(f"the weights of {config.store} came from a file; give it again with --weights PATH")
    return EncoderConfig(
        encoder=config.encoder or name,
        weights=weights,
        input_size=recipe.encoder.input_size,
        layers=_layers(recipe.encoder),
        combination=(recipe.encoder.aggregation or {}).get("combination"),
        encoder_args=model_args if config.encoder_args is None else config.encoder_args,
        compile=config.compile,
    )


def _named_model(encoder: EncoderIdentity) -> tuple[str, str]:
    """Return name and further arguments of the timm model, of an identity's name such as ``test_vit[depth=1]``."""
    name, _, arguments = encoder.name.partition("[")
    return name, arguments.removesuffix("]")


def _layers(encoder: EncoderIdentity) -> str | None:
    """Return the blocks that an identity names, in words; None is the last one alone."""
    found = encoder.aggregation
    return None if found is None else ",".join(map(str, found["layers"]))


def _log_bad(before: Store, after: Store) -> None:
    """How many rows were valid before and are not now, because the new views lack them."""
    lost = len(before.valid_rows) - len(after.valid_rows)
    if lost:
        log(f"{lost} rows that were valid before lack a new view, and count as unusable now")
