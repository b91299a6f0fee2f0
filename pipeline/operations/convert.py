"""`pipeline convert`: the same rows in another format, compression or storage type."""

import dataclasses

from pipeline.console import log
from pipeline.encode.calibrate import report_measured
from pipeline.operations.copying import copy
from pipeline.settings.operations import ConvertConfig
from shards import (
    Int8Code,
    Recipe,
    Store,
    UsageError,
    UserError,
    describe_error,
    even_spread,
    fit_and_judge,
    open_store,
    published_code,
    sample_stored,
)
from shards.metadata.layout import ROOT
from shards.metadata.root import read_recipe
from shards.writing.copying import copied_recipe
from shards.writing.selection import every_row


def convert(config: ConvertConfig) -> None:
    """Copy a store into another format, row for row; run again, it continues.

    Raises:
        UserError: If the store is damaged, or the copy cannot be made, or int8 has cost more than is allowed.
    """
    _check_compression(config)
    source = open_store(config.store, follow_links=config.follow_links)
    selection = every_row(source)
    form = {
        "format": config.format,
        "compression": None if config.compression == "none" else config.compression,
        "image_compression": None if config.image_compression == "none" else config.image_compression,
    }
    code = source.code
    if config.dtype == "same":
        recipe = copied_recipe(selection, **form)
    else:
        code = _code(config, source)
        recipe = recoded_recipe(
            copied_recipe(selection, **form), config.dtype, code, config.calibration_rows, config.code_error
        )
    if recipe.id == source.recipe.id:
        raise UsageError(
            f"{config.store} is all that already; name another --dtype, --format, --compression or "
            "--image-compression"
        )
    copy(selection, recipe, config.out, command="convert", code=code)
    if config.dtype == "int8":
        report_measured(open_store(config.out), config.allow_error)


def recoded_recipe(
    recipe: Recipe, dtype: str, code: Int8Code | None, calibration_rows: int, code_error: float
) -> Recipe:
    """Return a recipe with another storage type; the last three are int8's."""
    return dataclasses.replace(
        recipe,
        dtype=dtype,
        code=None if code is None else code.digest,
        calibration_rows=0 if code is None else calibration_rows,
        code_error=0.0 if code is None else code_error,
    )


def _check_compression(config: ConvertConfig) -> None:
    for option, codec in (
        ("--compression", config.compression),
        ("--image-compression", config.image_compression),
    ):
        if config.format != "zarr" and codec != "none":
            raise UsageError(
                f"{option} {codec} is zarr's own, and the new store is to be {config.format}; add --format "
                "zarr"
            )


def _code(config: ConvertConfig, source: Store) -> Int8Code | None:
    """Return the code the new store was begun with, or a new one fitted to the old store's rows; None but for int8."""
    if source.code is not None:
        raise UsageError(
            f"{config.store} holds int8 tokens already, and what their code has lost no other type brings "
            "back; "
            "convert it with --dtype same"
        )
    if config.dtype != "int8":
        return None
    if (config.out / ROOT).exists():
        begun = published_code(config.out, read_recipe(config.out))
        if begun is not None:
            return begun
    rows = source.valid_rows
    if not len(rows):
        raise UserError(
            f"{config.store} has no valid row to fit an int8 code to; encode a source with usable images"
        )
    places = even_spread(config.calibration_rows, len(rows))
    calibration = fit_and_judge(sample_stored(source, rows[places]), aim=config.code_error)
    calibration.require(config.allow_error)
    log(f"int8 {describe_error(calibration.error)}, on rows the code was not fitted to")
    return calibration.code
