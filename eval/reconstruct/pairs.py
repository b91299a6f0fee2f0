"""Originals beside their reconstructions, and what is measured of such pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.images.sheets import grid, save_png, side_by_side, to_uint8
from eval.metrics.extraction import FeatureSet
from eval.metrics.features import FeatureName, InceptionFeatures
from eval.metrics.similarity import lpips, psnr, ssim
from eval.networks.frozen import load_perceptual
from eval.networks.load import Decoder
from eval.settings import ReconstructionSettings
from shards import Store, even_spread
from train.distributed import Team
from train.models.dequantize import Dequantizer, stored_tensor

POOL: set[FeatureName] = {"pool"}
"""Inception features of rFID."""
SHEET_IMAGES = 8
"""Images of a sheet of reconstructions."""


@dataclass
class PairScores:
    """What one process has measured of its rows."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    scores: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    """Metrics of the single images, by name."""
    originals: FeatureSet = field(default_factory=FeatureSet)
    reconstructions: FeatureSet = field(default_factory=FeatureSet)


class Pairs:
    """Originals of a store beside what the decoder makes of their tokens.

    Args:
        store: A store with images.
        decoder: Decodes raw tokens to images.
        device: Where it computes.
        rounding: See `eval.images.sheets.to_uint8`.
        recode: Applied to the raw tokens, float32 [B, N, D], before they are decoded.
    """

    def __init__(
        self,
        store: Store,
        decoder: Decoder,
        device: torch.device,
        *,
        rounding: bool = False,
        recode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        # A store of random crops alone has no other view.
        view = "center" if "center" in store.views else store.views[0]
        self.store = store
        self._tokens = store.reader(view, "tokens")
        self._dequantizer = Dequantizer.of(store).to(device)
        self._images = store.reader(view, "image")
        self._decoder = decoder
        self._device = device
        self._rounding = rounding
        self._recode = recode

    def of(self, store: Store) -> Pairs:
        """Return the same of another store."""
        return Pairs(store, self._decoder, self._device, rounding=self._rounding, recode=self._recode)

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the originals and reconstructions of some rows, uint8 [B, 3, H, W] each, on the device."""
        tokens = np.empty((len(rows), *self._tokens.row_shape), self._tokens.dtype)
        images = np.empty((len(rows), *self._images.row_shape), np.uint8)
        self._tokens.read(rows, tokens)
        self._images.read(rows, images)
        raw = self._dequantizer(stored_tensor(tokens, self._tokens.logical_dtype).to(self._device))
        if self._recode is not None:
            raw = self._recode(raw)
        made = to_uint8(self._decoder.pixels(raw), rounding=self._rounding)
        original = torch.from_numpy(images).to(self._device)
        return original.permute(0, 3, 1, 2), made.permute(0, 3, 1, 2)


def sheet_writer(pairs: Pairs, rows: NDArray[np.int64], team: Team) -> Callable[[Path], None]:
    """Return what writes a sheet of the same few images beside their reconstructions; every process must call it.

    Args:
        pairs: The images.
        rows: Rows to spread them over.
        team: The processes; the leading one writes.
    """
    shown = rows[even_spread(SHEET_IMAGES, len(rows))]

    @torch.no_grad()
    def write(path: Path) -> None:
        originals, made = (side.permute(0, 2, 3, 1).cpu().numpy() for side in pairs.read(shown))
        if team.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(side_by_side(originals, made), SHEET_IMAGES // 2), path)

    return write


class PairScorer:
    """Measures pairs of images, batch by batch."""

    def __init__(self, settings: ReconstructionSettings, device: torch.device) -> None:
        self.found = PairScores()
        self._metrics = settings.metrics
        self._perceptual = (
            load_perceptual(settings.perceptual_weights, device) if "lpips" in settings.metrics else None
        )
        self.inception = (
            InceptionFeatures(settings.feature_weights, device) if "rfid" in settings.metrics else None
        )

    def add(self, rows: NDArray[np.int64], originals: Tensor, made: Tensor) -> None:
        """Measure a batch, uint8 [B, 3, H, W] each."""
        self.found.rows.append(rows)
        # PSNR also orders the page of best, median and worst.
        scores = {"psnr": psnr(originals, made)}
        if "ssim" in self._metrics:
            scores["ssim"] = ssim(originals, made)
        if self._perceptual is not None:
            scores["lpips"] = lpips(self._perceptual, originals, made)
        for name, values in scores.items():
            self.found.scores.setdefault(name, []).append(values.cpu().numpy())
        if self.inception is not None:
            for side, images in ((self.found.originals, originals), (self.found.reconstructions, made)):
                side.add(self.inception.features(images), moments=POOL, keep=set())


def merged(parts: list[PairScores]) -> PairScores:
    """Gather what all processes have measured, in the order of their ranks."""
    whole = PairScores()
    for part in parts:
        whole.rows.extend(part.rows)
        for name, values in part.scores.items():
            whole.scores.setdefault(name, []).extend(values)
        whole.originals.merge(part.originals)
        whole.reconstructions.merge(part.reconstructions)
    return whole
