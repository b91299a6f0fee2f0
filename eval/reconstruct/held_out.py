"""How well a decoder in training reconstructs images that it is not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eval.images.sources import blocks
from eval.metrics.similarity import lpips, psnr, ssim
from eval.reconstruct.pairs import Pairs
from train.distributed import Team
from train.models.perceptual import Perceptual

BATCH_SIZE = 32
"""Images a process decodes at a time."""


@dataclass(frozen=True, kw_only=True)
class HeldOutImages:
    """Fixed images, their reconstructions and how far these are off, the work shared by all processes.

    Figures are those of `eval/reconstruction.py`, of 8-bit images decoded from tokens without noise.
    """

    pairs: Pairs
    """Originals beside what the decoder makes of their tokens, as it is when they are read."""
    rows: NDArray[np.int64]
    """[n] rows of the store, at least one."""
    team: Team
    """The processes; each must ask for the scores."""
    perceptual: Perceptual | None = None
    """The perceptual distance; None: none is measured."""

    def scores(self) -> dict[str, float]:
        """Return means over the images: `held_out_psnr` in dB, `held_out_ssim`, and, if measured, `held_out_lpips`."""
        share = -(-len(self.rows) // self.team.world_size)
        numbers = np.arange(share) + share * self.team.rank
        # Every process decodes equally often, which sharded weights need; what comes twice counts once.
        rows, counts = self.rows[numbers.clip(max=len(self.rows) - 1)], numbers < len(self.rows)
        found: dict[str, float | torch.Tensor] = {}
        for first, last in blocks(0, share, BATCH_SIZE):
            originals, made = self.pairs.read(rows[first:last])
            weights = torch.from_numpy(counts[first:last]).to(originals.device, torch.float64)
            measured = {"psnr": psnr(originals, made), "ssim": ssim(originals, made)}
            if self.perceptual is not None:
                measured["lpips"] = lpips(self.perceptual, originals, made)
            for name, values in measured.items():
                found[name] = found.get(name, 0.0) + weights @ values
        summed = self.team.sum(torch.stack([torch.as_tensor(total) for total in found.values()]))
        return {
            f"held_out_{name}": total / len(self.rows)
            for name, total in zip(found, summed.tolist(), strict=True)
        }
