"""What a decoder is trained on: drawing the stored image from its tokens, made noisy so that it learns to forgive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from train.config import DecoderSettings, TokenNoise
from train.feed import MicroBatch
from train.loop import Losses
from train.models.config import ViTDecoderConfig
from train.models.vit_decoder import ViTDecoder
from train.randomness import normal, uniform
from train.snapshot import SnapshotMeta, save_snapshot


class ReconstructionTask:
    """A decoder and its loss; the `Task` of `train/decoder.py`."""

    metric_names = ("psnr",)

    def __init__(
        self,
        model: ViTDecoder,
        settings: DecoderSettings,
        meta: Callable[[int, float], SnapshotMeta],
        sampler: Callable[[ViTDecoder, Path], None] | None = None,
    ) -> None:
        """Assemble the task.

        Args:
            model: the network, on its device.
            settings: resolved settings.
            meta: origin of a snapshot taken at (step, rate).
            sampler: draws reconstructions of fixed rows.
        """
        self.model = model
        self._settings, self._meta, self._sampler = settings, meta, sampler

    @property
    def config(self) -> ViTDecoderConfig:
        """The network's configuration."""
        return self.model.config

    def losses(self, model: Callable[[Tensor], Tensor], batch: MicroBatch) -> Losses:
        """Mean absolute error of the pixels on the [0, 1] scale, per sample, and the PSNR.

        Source: github:bytetriper/RAE src/train_stage1.py at a4d18c4 (the reconstruction is not clamped).
        """
        tokens = batch.fields["tokens"].float()
        tokens = noisy(tokens, batch.positions, self._settings.noise, self._settings.seed)
        target = batch.fields["image"].permute(0, 3, 1, 2).float() / 255
        error = model(tokens).float() - target
        per_sample = error.abs().flatten(1).mean(dim=1)
        with torch.no_grad():
            psnr = -10 * torch.log10(error.square().flatten(1).mean(dim=1))
            metrics = torch.stack([psnr.sum(), psnr.new_tensor(len(psnr))])[None]
        return Losses(per_sample, metrics)

    def describe(self, positions: Tensor) -> str:
        """The noise scales drawn for samples whose loss is not finite."""
        scale = noise_scale(positions, self._settings.noise, self._settings.seed)
        return f"noise {[round(value, 4) for value in scale.tolist()]}"

    def save_snapshot(self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float) -> None:
        """Write weights to use."""
        save_snapshot(
            path, weights, config=self.model.config, normalizer=None, meta=self._meta(step, ema_rate)
        )

    def draw_samples(self, path: Path) -> None:
        """Draw reconstructions of fixed rows."""
        if self._sampler is not None:
            self._sampler(self.model, path)


def noise_scale(positions: Tensor, noise: TokenNoise, seed: int) -> Tensor:
    """Deviation of each sample's noise, float32 [b].

    Source: uniform: github:bytetriper/RAE src/stage1/rae.py at a4d18c4; half-normal: arXiv 2510.11690 section 3.
    """
    if noise.distribution == "uniform":
        return noise.tau * uniform(seed, "token noise scale", positions)
    return noise.tau * normal(seed, "token noise scale", positions).abs()


def noisy(tokens: Tensor, positions: Tensor, noise: TokenNoise, seed: int) -> Tensor:
    """Raw tokens [b, N, D] plus normal noise of each sample's own deviation."""
    if noise.tau == 0:
        return tokens
    scale = noise_scale(positions, noise, seed)
    return tokens + scale[:, None, None] * normal(seed, "token noise", positions, tuple(tokens.shape[1:]))
