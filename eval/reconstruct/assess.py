"""What another storage type would do to a finished store: error by channel, bytes, and reconstructions by a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.settings import AssessSettings, ReconstructionSettings
from shards import (
    Int8Code,
    Store,
    UsageError,
    describe_error,
    even_spread,
    fit_and_judge,
    open_store,
    row_codec,
    sample_stored,
    storage_type,
    to_float64,
    to_storage,
)
from shards.metadata.layout import field_of

if TYPE_CHECKING:
    from torch import Tensor

_COMPRESSED_ROWS = 64
_WORST = 10


def assessment(settings: AssessSettings) -> dict[str, Any]:
    """Return everything, as plain JSON values.

    Raises:
        UsageError: The store is of int8 already, or has too few rows.
        UserError: The decoder does not fit it.
    """
    store = open_store(settings.store)
    if store.code is not None:
        raise UsageError(f"{settings.store} holds int8 tokens already; assess the store they were made from")
    count = min(settings.rows, len(store.valid_rows))
    if count < 2:
        raise UsageError(f"{settings.store} has {count} rows to assess; at least 2 are needed")
    rows = store.valid_rows[even_spread(count, len(store.valid_rows))]
    sample = sample_stored(store, rows)
    code = None
    if settings.dtype == "int8":
        calibration = fit_and_judge(sample, aim=settings.code_error)
        code, error = calibration.code, calibration.error
    else:
        error = _rounding_error(sample, settings.dtype)
    worst = np.argsort(-error, kind="stable")[:_WORST]
    facts: dict[str, Any] = {
        "store": str(settings.store),
        "dtype": store.recipe.dtype,
        "as": settings.dtype,
        "rows": count,
        "error": {
            "median": float(np.median(error)),
            "largest": float(error.max()),
            "worst_channels": {int(channel): float(error[channel]) for channel in worst},
            "channels": [float(value) for value in error],
        },
        "summary": describe_error(error),
        "row_bytes": _row_bytes(store, rows, settings.dtype, code),
    }
    if settings.decoder is not None:
        # The code was fitted to every other row: images are judged on the rest.
        facts["pictures"], facts["cautions"] = _decoded_scores(settings, store, rows[1::2], code)
    return facts


def _recoded(values: NDArray[np.float32], dtype: str, code: Int8Code | None) -> NDArray[np.float32]:
    """Round tokens float32 [..., D] as storing them in a type does."""
    if code is not None:
        return code.decode(code.encode(values))
    stored = storage_type(dtype)
    return to_float64(to_storage(values, stored), stored).astype(np.float32)


def _rounding_error(sample: NDArray[np.float32], dtype: str) -> NDArray[np.float64]:
    values = sample.reshape(-1, sample.shape[-1])
    lost = np.sqrt(np.square(_recoded(values, dtype, None).astype(np.float64) - values).mean(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost == 0, 0.0, lost / values.astype(np.float64).std(axis=0))


def _row_bytes(store: Store, rows: NDArray[np.int64], dtype: str, code: Int8Code | None) -> dict[str, int]:
    """Return the bytes of a row's tokens now and then, and what each compression would leave of them."""
    field = field_of(store.recipe, store.views[0], "tokens")
    reader = store.reader(field.view, "tokens")
    stored = np.empty((1, *reader.row_shape), reader.dtype)
    compressed = {"blosc": 0, "zstd": 0}
    chosen = rows[even_spread(_COMPRESSED_ROWS, len(rows))]
    for row in chosen.tolist():
        reader.read([row], stored)
        values = store.decode(stored)
        recoded = to_storage(values, storage_type(dtype)) if code is None else code.encode(values)
        for name in compressed:
            compressed[name] += len(row_codec(name).encode(recoded[0]))
    sizes = {name: round(total / len(chosen)) for name, total in compressed.items()}
    plain = field.row_nbytes // field.dtype.numpy.itemsize * storage_type(dtype).numpy.itemsize
    return {"now": field.row_nbytes, "then": plain, **sizes}


def _decoded_scores(
    settings: AssessSettings, store: Store, rows: NDArray[np.int64], code: Int8Code | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics of `eval/reconstruction.py` on the same rows before and after, and cautions about them."""
    import torch

    from eval.networks.load import decoder_of, load_decoder, set_precision
    from eval.reconstruct.pairs import Pairs, PairScorer
    from eval.reconstruct.run import mean_scores, require_decoder_of, rfid, score
    from train.distributed import Team

    assert settings.decoder is not None
    measured = ReconstructionSettings(
        store=settings.store,
        decoder=settings.decoder,
        metrics=settings.metrics,
        feature_weights=settings.feature_weights,
    )
    team = Team()
    try:
        set_precision(measured.precision)
        snapshot = load_decoder(settings.decoder, team.device, store.recipe.encoder)
        require_decoder_of(store, snapshot, settings.decoder)
        decoder = decoder_of(snapshot, measured.precision)

        def recode(tokens: Tensor) -> Tensor:
            kept = _recoded(tokens.cpu().numpy(), settings.dtype, code)
            return torch.from_numpy(kept).to(tokens.device)

        found: dict[str, Any] = {}
        cautions: list[str] = []
        for name, change in (("before", None), ("after", recode)):
            scorer = PairScorer(measured, team.device)
            scores = score(Pairs(store, decoder, team.device, recode=change), rows, scorer, team)
            results: dict[str, Any] = mean_scores(scores)
            if scorer.inception is not None:
                size = (store.image_size, store.image_size)
                results |= rfid(scores, scorer.inception, None, size, team)
                cautions = results["warnings"]
            found[name] = {metric: float(results[metric]) for metric in settings.metrics}
    finally:
        team.close()
    return found, cautions


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts for people, a line each."""
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
