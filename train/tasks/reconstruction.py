"""A decoder's reconstruction loss: the stored image from its tokens, which get noise so that it tolerates errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.feed import MicroBatch
from train.engine.task import Losses, Task, sum_and_count
from train.models.config import ViTDecoderConfig
from train.models.perceptual import Perceptual
from train.models.vit_decoder import ViTDecoder
from train.randomness import normal, uniform
from train.settings.config import DecoderSettings, TokenNoise
from train.tasks.losses import pixel_loss, to_symmetric
from train.weights.snapshot import SnapshotMeta, save_snapshot


class ReconstructionTask(Task):
    """A decoder and its reconstruction loss; the `Task` of `train/decoder.py`."""

    metric_names: ClassVar[tuple[str, ...]] = ("l1", "lpips", "psnr")
    fields: tuple[str, ...] = ("tokens", "image")
    model: ViTDecoder

    def __init__(
        self,
        model: ViTDecoder,
        settings: DecoderSettings,
        meta: Callable[[int, float], SnapshotMeta],
        render: Callable[[Path], None] | None = None,
        *,
        dequantizer: Callable[[Tensor], Tensor],
        perceptual: Perceptual | None = None,
        held_out: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Assemble the task.

        Args:
            model: the network, on its device.
            settings: resolved settings.
            meta: origin of a snapshot taken at (step, rate).
            render: writes a sheet of reconstructions of fixed rows by the network, as it is then.
            dequantizer: makes float32 of tokens as they are stored, on the same device.
            perceptual: the perceptual distance; None: L1 alone.
            held_out: measures the network, as it is then, on images it does not learn from.
        """
        self.model = model
        self._settings, self._meta, self._render, self._perceptual = settings, meta, render, perceptual
        self._dequantizer, self._held_out = dequantizer, held_out
        self.evaluate_every = settings.evaluate_every

    @property
    def config(self) -> ViTDecoderConfig:
        """The network's configuration."""
        return self.model.config

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return the L1 of the pixels on the [0, 1] scale and the perceptual distance, per sample."""
        return self.compare(self.decode(model, batch), batch)

    def decode(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return pixels [b, 3, H, W] of noisy tokens, nominally in [0, 1], not clamped."""
        noise, seed = self._settings.noise, self._settings.seed
        tokens, pool = self.tokens(batch), self.model.pool
        if pool is None:
            pixels: Tensor = model(noisy(tokens, batch.positions, noise, seed))
        else:
            # What a generator will be off by are the latents.
            empty = tokens.new_zeros(len(tokens), pool.config.num_latents, pool.config.latent_width)
            pixels = model(tokens, noisy(empty, batch.positions, noise, seed))
        return pixels

    def compare(self, pixels: Tensor, batch: MicroBatch) -> Losses:
        """Return how far pixels are from the stored images.

        Source: github:bytetriper/RAE src/train_stage1.py at a4d18c4 (the reconstruction is not clamped).
        """
        target = target_pixels(batch)
        loss = l1 = pixel_loss(pixels, target)
        distance = torch.zeros(0, device=l1.device)
        if self._perceptual is not None:
            distance = self._perceptual(to_symmetric(target), to_symmetric(pixels)).float()
            loss = l1 + self._settings.perceptual_weight * distance
        with torch.no_grad():
            psnr = -10 * torch.log10((pixels.float() - target).square().flatten(1).mean(dim=1))
            measured = {"l1": l1, "lpips": distance, "psnr": psnr}
        return Losses(loss, {name: sum_and_count(values.detach()) for name, values in measured.items()})

    def tokens(self, batch: MicroBatch) -> Tensor:
        """Return raw tokens float32 [b, N, D]."""
        found: Tensor = self._dequantizer(batch.fields["tokens"])
        return found

    def describe(self, positions: Tensor) -> str:
        """Return the noise scales drawn for samples whose loss is not finite."""
        scale = noise_scale(positions, self._settings.noise, self._settings.seed)
        return f"noise {[round(value, 4) for value in scale.tolist()]}"

    def save_snapshot(
        self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float, write: bool = True
    ) -> None:
        """Write weights to use."""
        save_snapshot(
            path,
            weights,
            config=self.model.config,
            normalizer=None,
            meta=self._meta(step, ema_rate),
            write=write,
        )

    def render_samples(self, path: Path) -> None:
        """Write a sheet of reconstructions of fixed rows."""
        if self._render is not None:
            self._render(path)

    def evaluate(self) -> dict[str, float]:
        """Measure on held-out images."""
        return {} if self._held_out is None else self._held_out()


def target_pixels(batch: MicroBatch) -> Tensor:
    """Return the stored images as pixels float32 [b, 3, H, W] in [0, 1]."""
    return batch.fields["image"].permute(0, 3, 1, 2).float() / 255


def noise_scale(positions: Tensor, noise: TokenNoise, seed: int) -> Tensor:
    """Return the std of each sample's noise, float32 [b].

    Source: uniform: github:bytetriper/RAE src/stage1/rae.py at a4d18c4; half-normal: arXiv 2510.11690 section 3.
    """
    if noise.distribution == "uniform":
        return noise.tau * uniform(seed, "token noise scale", positions)
    return noise.tau * normal(seed, "token noise scale", positions).abs()


def noisy(tokens: Tensor, positions: Tensor, noise: TokenNoise, seed: int) -> Tensor:
    """Return raw tokens [b, N, D] plus normal noise of each sample's own standard deviation."""
    if noise.tau == 0:
        return tokens
    scale = noise_scale(positions, noise, seed)
    return tokens + scale[:, None, None] * normal(seed, "token noise", positions, tuple(tokens.shape[1:]))
