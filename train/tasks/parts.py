"""What an objective of `train/dit.py` is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards import Store
from train.distributed import Team
from train.models.build import Generator
from train.models.dequantize import Dequantizer
from train.models.normalizer import LatentNormalizer
from train.settings.config import DiTSettings
from train.weights.snapshot import SnapshotMeta


@dataclass(frozen=True, kw_only=True)
class DiTParts:
    """Network, data and settings of a run of `train/dit.py`; every tensor is on the process's device."""

    settings: DiTSettings
    """Resolved settings."""
    model: Generator
    """The network that is trained."""
    normalizer: LatentNormalizer
    """Between the store's tokens and latents."""
    dequantizer: Dequantizer
    """From tokens as they are stored to float32."""
    snapshot_meta: Callable[[int, float], SnapshotMeta]
    """Origin of a snapshot taken at (step, EMA rate)."""
    store: Store | None = None
    """The store that is trained on, for an objective that needs more of it than its tokens."""
    team: Team | None = None
    """The processes, for an objective that computes over all of them."""
    render: Callable[[Generator, LatentNormalizer, Path], None] | None = None
    """Writes a sheet of samples of the network; None: there is no decoder to render them with."""
    fid: Callable[[Generator, LatentNormalizer], float] | None = None
    """FID of samples of the network; every process must call it. None: there is nothing to compare with."""
