"""Metrics by band: what a loss is for early and late times, or for short and long jumps, apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BANDS = 10
"""Bands of [0, 1] whose errors are logged separately: they differ more between bands than between steps."""


def band_names(prefix: str) -> tuple[str, ...]:
    """Return a metric's name in each band, by the number at which the band begins."""
    return tuple(f"{prefix}{band / NUM_BANDS:.1f}" for band in range(NUM_BANDS))


def sums_by_band(
    names: Sequence[str], values: Tensor, places: Tensor, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return sum and weight, float32 [2], of values [b] at places [b] in [0, 1] in each band, by the metric's name.

    Args:
        names: what `band_names` gives.
        values: float32 [b].
        places: what is divided into bands, [b].
        weights: how much each value counts, [b]; None: 1.
    """
    band = (places * NUM_BANDS).long().clamp_(0, NUM_BANDS - 1)
    member = torch.nn.functional.one_hot(band, NUM_BANDS).to(values.dtype)
    if weights is not None:
        member = member * weights[:, None]
    # Where a loss is not finite, 0 · inf would make every band NaN; the whole step is left out anyway.
    sums_and_weights = torch.stack([member.T @ values, member.sum(dim=0)], dim=1)
    return dict(zip(names, sums_and_weights, strict=True))
