"""`pipeline convert`: the same rows in another form, compression or storage type."""

import dataclasses
import sys

import numpy as np
from tqdm import tqdm

from pipeline.calibrate import fit_and_judge, sample_stored
from pipeline.console import say
from pipeline.int8_error import describe_error, report_measured
from pipeline.operations import ConvertConfig
from shards.code_arrays import published_code
from shards.convert import convert_store
from shards.errors import UsageError
from shards.layout import ROOT
from shards.quantize import Int8Code
from shards.recode import recode_store, recoded_recipe
from shards.root import read_recipe
from shards.store import Store, open_store


def convert(config: ConvertConfig) -> None:
    """Copies a store into another form, row for row; run again, it continues.

    Raises:
        UserError: If the store is damaged, or the copy cannot be made, or int8 has cost more than is allowed.
    """
    with tqdm(unit="shard", desc="convert", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        compression = None if config.compression == "none" else config.compression
        if config.dtype == "same":
            manifest = convert_store(
                config.store, config.out, format=config.format, compression=compression, progress=show
            )
        else:
            source = open_store(config.store)
            code = _code(config, source) if config.dtype == "int8" else None
            recipe = dataclasses.replace(
                recoded_recipe(
                    source,
                    config.dtype,
                    code,
                    calibration_rows=config.calibration_rows if code else 0,
                    code_error=config.code_error if code else 0.0,
                ),
                format=config.format,
                compression=compression,
            )
            if recipe.id == source.recipe.id:
                raise UsageError(f"{config.store} is all that already; name another --dtype or --format")
            manifest = recode_store(source, config.out, recipe, source.plan, code, progress=show).manifest
    say(f"{config.out} is complete: {manifest.num_valid} rows as {config.format}, {manifest.recipe.dtype}")
    if config.dtype == "int8":
        report_measured(open_store(config.out), config.allow_error)


def _code(config: ConvertConfig, source: Store) -> Int8Code:
    """The code the new store was begun with, or a new one fitted to the old store's rows."""
    if source.code is not None:
        raise UsageError(f"{config.store} holds int8 tokens already; convert it with --dtype same")
    if (config.out / ROOT).exists():
        begun = published_code(config.out, read_recipe(config.out))
        if begun is not None:
            return begun
    rows = source.valid_rows
    places = np.linspace(0, len(rows) - 1, min(config.calibration_rows, len(rows))).astype(np.int64)
    calibration = fit_and_judge(sample_stored(source, rows[places]), aim=config.code_error)
    calibration.require(config.allow_error)
    say(f"int8 {describe_error(calibration.error)}, on rows the code was not fitted to")
    return calibration.code
