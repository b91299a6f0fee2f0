"""`pipeline assess`: what another storage type would do to a finished store, before anything is converted."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.encode.calibrate import fit_and_judge, sample_stored
from pipeline.encode.int8_error import describe_error
from pipeline.operations.convert import recoded_recipe
from pipeline.settings.operations import AssessConfig
from shards import (
    Int8Code,
    Store,
    UsageError,
    UserError,
    even_spread,
    open_store,
    row_codec,
    storage_type,
    to_float64,
    to_storage,
)
from shards.metadata.layout import field_of
from shards.writing.copying import begin_copy, copied_recipe, copy_rows
from shards.writing.selection import Part, dealt_anew

_COMPRESSED_ROWS = 64
_WORST = 10


def assess(config: AssessConfig) -> None:
    """Prints error by channel, bytes, and with a decoder what becomes of the pictures.

    Raises:
        UserError: If the store cannot be assessed, or the decoder does not fit it.
    """
    facts = assessment(config)
    text = json.dumps(facts, indent=1, ensure_ascii=False) if config.json else as_text(facts)
    sys.stdout.write(text + "\n")


def assessment(config: AssessConfig) -> dict[str, Any]:
    """The same as plain JSON values.

    Raises:
        UsageError: If the store is of int8 already, or has too few rows.
    """
    store = open_store(config.store)
    if store.code is not None:
        raise UsageError(f"{config.store} holds int8 tokens already; assess the store they were made from")
    count = min(config.rows, len(store.valid_rows))
    if count < 2:
        raise UsageError(f"{config.store} has {count} rows to assess; at least 2 are needed")
    rows = store.valid_rows[even_spread(count, len(store.valid_rows))]
    sample = sample_stored(store, rows)
    code = None
    if config.dtype == "int8":
        calibration = fit_and_judge(sample, aim=config.code_error)
        code, error = calibration.code, calibration.error
    else:
        error = _rounding_error(sample, config.dtype)
    worst = np.argsort(-error, kind="stable")[:_WORST]
    facts: dict[str, Any] = {
        "store": str(config.store),
        "dtype": store.recipe.dtype,
        "as": config.dtype,
        "rows": count,
        "error": {
            "median": float(np.median(error)),
            "largest": float(error.max()),
            "worst_channels": {int(channel): float(error[channel]) for channel in worst},
            "channels": [float(value) for value in error],
        },
        "summary": describe_error(error),
        "row_bytes": _row_bytes(store, rows, config.dtype, code),
    }
    if config.decoder is not None:
        # The code was fitted to every other row: pictures are judged on the rest.
        facts["pictures"], facts["cautions"] = _pictures(config, store, rows[1::2], code)
    return facts


def _rounding_error(sample: NDArray[np.float32], dtype: str) -> NDArray[np.float64]:
    stored = storage_type(dtype)
    values = sample.reshape(-1, sample.shape[-1])
    kept = to_float64(to_storage(values, stored), stored)
    lost = np.sqrt(np.square(kept - values).mean(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost == 0, 0.0, lost / values.astype(np.float64).std(axis=0))


def _row_bytes(store: Store, rows: NDArray[np.int64], dtype: str, code: Int8Code | None) -> dict[str, int]:
    """Bytes of a row's tokens now and then, and what each compression would leave of them."""
    field = field_of(store.recipe, store.views[0], "tokens")
    reader = store.reader(field.view, "tokens")
    stored = np.empty((1, *reader.row_shape), reader.dtype)
    compressed = {"blosc": 0, "zstd": 0}
    chosen = rows[:: max(1, len(rows) // _COMPRESSED_ROWS)][:_COMPRESSED_ROWS]
    for row in chosen.tolist():
        reader.read([row], stored)
        values = store.decode(stored)
        recoded = to_storage(values, storage_type(dtype)) if code is None else code.encode(values)
        for name in compressed:
            compressed[name] += len(row_codec(name).encode(recoded[0]))
    sizes = {name: round(total / len(chosen)) for name, total in compressed.items()}
    plain = field.row_nbytes // field.dtype.numpy.itemsize * storage_type(dtype).numpy.itemsize
    return {"now": field.row_nbytes, "then": plain, **sizes}


def _pictures(
    config: AssessConfig, store: Store, rows: NDArray[np.int64], code: Int8Code | None
) -> tuple[dict[str, Any], list[str]]:
    """What `eval/reconstruction.py` finds on the same rows before and after, and what makes it mean less."""
    images = np.searchsorted(store.plan.rows, rows)
    selection = dealt_anew([Part(store, images)], store.class_names, 1, store.recipe.seed)
    found, cautions = {}, []
    with tempfile.TemporaryDirectory(prefix="assess-", dir=config.scratch) as scratch:
        for name, dtype, own_code in (("before", store.recipe.dtype, None), ("after", config.dtype, code)):
            form = copied_recipe(
                selection, views=("center",), format="zarr", compression=None, image_compression=None
            )
            recipe = recoded_recipe(form, dtype, own_code, 0, 0.0)
            writer, _ = begin_copy(selection, Path(scratch) / name, recipe, own_code)
            copy_rows(selection, writer, {})
            results = _reconstruct(config, Path(scratch), name)
            found[name] = {metric: float(results[metric]) for metric in config.metrics}
            cautions = results.get("warnings", [])
    return found, cautions


def _reconstruct(config: AssessConfig, scratch: Path, name: str) -> dict[str, Any]:
    """results.json of the evaluation, which runs as a command of its own and shares nothing but the store."""
    out = scratch / f"{name}-results"
    command = [sys.executable, "-m", "eval.reconstruction", str(scratch / name)]
    command += ["--decoder", str(config.decoder), "--out", str(out)]
    command += ["--metrics", *config.metrics, "--feature-weights", config.feature_weights]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"eval/reconstruction.py failed on the rows {name}: {last.removeprefix('error: ')}")
    results: dict[str, Any] = json.loads((out / "results.json").read_bytes())
    return results


def as_text(facts: dict[str, Any]) -> str:
    """The facts for people, a line each."""
    worst = ", ".join(f"{channel} {error:.2%}" for channel, error in facts["error"]["worst_channels"].items())
    sizes = facts["row_bytes"]
    lines = [
        f"store      {facts['store']}, {facts['dtype']}; assessed as {facts['as']} on {facts['rows']} rows",
        f"error      {facts['as']} {facts['summary']}",
        f"channels   worst {worst}",
        f"row        {sizes['now']:,} bytes now, {sizes['then']:,} as {facts['as']} "
        f"({sizes['then'] / sizes['now']:.0%}); {sizes['zstd']:,} with --compression zstd, "
        f"{sizes['blosc']:,} with blosc",
    ]
    if "pictures" in facts:
        before, after = facts["pictures"]["before"], facts["pictures"]["after"]
        lines += [
            f"pictures   {metric} {before[metric]:.4f} before, {after[metric]:.4f} after "
            f"({after[metric] - before[metric]:+.4f})"
            for metric in before
        ]
        lines += [f"           {caution}" for caution in facts["cautions"]]
    return "\n".join(lines)
