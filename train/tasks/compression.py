"""What a flat compressor learns: to give stored tokens back from a few latents. No image and no label is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from train.engine.feed import MicroBatch
from train.engine.task import Losses, Task, sum_and_count
from train.models.dequantize import Dequantizer
from train.models.flat import FlatVAE
from train.models.flat_config import FlatConfig
from train.randomness import normal
from train.settings.config import CompressorSettings
from train.tasks.flat_loss import FlatLoss, flat_terms
from train.weights.snapshot import SnapshotMeta, save_snapshot


class CompressionTask(Task):
    """A flat compressor and its loss; the `Task` of `train/compressor.py`."""

    metric_names: ClassVar[tuple[str, ...]] = ("huber", "mse", "kl")
    model: FlatVAE

    def __init__(
        self,
        model: FlatVAE,
        settings: CompressorSettings,
        meta: Callable[[int, float], SnapshotMeta],
        *,
        dequantizer: Dequantizer,
        weights: FlatLoss | None = None,
        render: Callable[[Path], None] | None = None,
        held_out: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Assemble the task.

        Args:
            model: the network, on its device.
            settings: resolved settings.
            meta: origin of a snapshot taken at (step, rate).
            dequantizer: makes numbers of tokens as they are stored, on the same device.
            weights: of the terms of the loss; None: the published ones.
            render: writes a sheet of what a decoder makes of tokens that went through the network, as it is then.
            held_out: measures the network, as it is then, on images it does not learn from.
        """
        self.model = model
        self._settings, self._meta, self._dequantizer = settings, meta, dequantizer
        self._weights = weights or FlatLoss()
        self._render, self._held_out = render, held_out
        self.evaluate_every = settings.evaluate_every

    @property
    def config(self) -> FlatConfig:
        """The network's configuration."""
        return self.model.config

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return Huber distance of the tokens and weighted KL of the latents, per sample."""
        tokens = self._dequantizer(batch.fields["tokens"])
        posterior, made = model(tokens, self.latent_noise(batch.positions))
        terms = flat_terms(posterior, made, tokens, config=self.config, weights=self._weights)
        measured = {"huber": terms.huber, "mse": terms.mse, "kl": terms.kl}
        metrics = {name: sum_and_count(values.detach()) for name, values in measured.items()}
        return Losses(terms.loss, metrics)

    def latent_noise(self, positions: Tensor) -> Tensor:
        """Return the standard normal numbers that latents are drawn with, float32 [b, K, F]."""
        shape = (self.config.num_latents, self.config.latent_width)
        return normal(self._settings.seed, "latent noise", positions, shape)

    def describe(self, positions: Tensor) -> str:
        """Return the first number drawn for samples whose loss is not finite."""
        return f"latent noise {[round(value, 4) for value in self.latent_noise(positions)[:, 0, 0].tolist()]}"

    def save_snapshot(
        self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float, write: bool = True
    ) -> None:
        """Write weights to use: both halves."""
        meta = self._meta(step, ema_rate)
        save_snapshot(path, weights, config=self.config, normalizer=None, meta=meta, write=write)

    def render_samples(self, path: Path) -> None:
        """Write a sheet of originals beside what a decoder makes of their tokens after the network."""
        if self._render is not None:
            self._render(path)

    def evaluate(self) -> dict[str, float]:
        """Measure on held-out images."""
        return {} if self._held_out is None else self._held_out()
