"""Flow matching: the network predicts the velocity from data to noise at a random time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.feed import MicroBatch
from train.engine.task import Losses, Task, sum_and_count
from train.flow.path import as_velocities, draw_time, interpolate, per_sample_loss, time_shift, velocity_loss
from train.models.build import Generator
from train.models.config import GeneratorConfig
from train.models.dequantize import Dequantizer, latents_of
from train.randomness import normal, uniform
from train.tasks.bands import band_names, sums_by_band
from train.tasks.parts import DiTParts
from train.weights.snapshot import save_snapshot

LOSS_BY_TIME = band_names("loss_t")
"""The loss in each band of the time t."""

BASE_LOSS_BY_TIME = band_names("loss_base_t")
"""The loss of the base output, without its weight, in each band of the time t."""


class VelocityTask(Task):
    """A diffusion transformer and its flow-matching loss: `train/dit.py --objective velocity`, its default."""

    metric_names: ClassVar[tuple[str, ...]] = (*LOSS_BY_TIME, "loss_base", *BASE_LOSS_BY_TIME, "loss_repa")
    model: Generator

    def __init__(self, parts: DiTParts) -> None:
        self.model, self.normalizer = parts.model, parts.normalizer
        self._parts, self._settings = parts, parts.settings
        self._latents = latents_of(parts.dequantizer, parts.normalizer)
        self.evaluate_every = parts.settings.fid_every
        repa = parts.settings.repa
        self._target: Dequantizer | None = None
        if repa.field is not None:
            assert parts.store is not None
            self.fields = ("tokens", repa.field)
            self._target = Dequantizer.of(parts.store.field(repa.field)).to(parts.normalizer.variance.device)
        config = parts.model.config
        self._null_label = config.num_classes
        self._shift = time_shift(
            config.token_width * config.grid[0] * config.grid[1], parts.settings.flow.shift_base
        )

    @property
    def config(self) -> GeneratorConfig:
        """The network's configuration."""
        return self.model.config

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return the velocity's squared error a sample and its sums by band of t; also the base output's, if any."""
        flow = self._settings.flow
        data = self._latents(batch.fields["tokens"])
        noise = normal(self._settings.seed, "noise", batch.positions, tuple(data.shape[1:]))
        t = self.times(batch.positions)
        align = {} if self._target is None else {"align": True}
        outputs = model(interpolate(data, noise, t), t, self.labels(batch), **align)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        aligned = outputs.pop() if align else None
        full, *base = (
            velocity_loss(output, data, noise, t, flow.prediction, flow.time_floor) for output in outputs
        )
        metrics = sums_by_band(LOSS_BY_TIME, full.detach(), t)
        for losses in base:
            metrics["loss_base"] = sum_and_count(losses.detach())
            metrics |= sums_by_band(BASE_LOSS_BY_TIME, losses.detach(), t)
            full = full + flow.base_weight * losses
        if self._target is not None and aligned is not None:
            repa = self._settings.repa
            distance = per_sample_loss(aligned, self._target(batch.fields[repa.field or ""]))
            metrics["loss_repa"] = sum_and_count(distance.detach())
            full = full + repa.weight * distance
        return Losses(full, metrics)

    def as_velocities(self, outputs: Tensor | tuple[Tensor, ...], x_t: Tensor, t: Tensor) -> list[Tensor]:
        """Convert a network's outputs to velocities, float32; the second is that of the base output, if any."""
        flow = self._settings.flow
        return as_velocities(outputs, x_t, t, flow.prediction, flow.time_floor)

    def times(self, positions: Tensor) -> Tensor:
        """Return the times drawn for samples, float32 [b]."""
        flow = self._settings.flow
        u = uniform(self._settings.seed, "time", positions)
        return draw_time(
            u,
            flow.time_distribution,
            mu=flow.mu,
            sigma=flow.sigma,
            shift=self._shift,
            latest=flow.latest_time,
        )

    def labels(self, batch: MicroBatch) -> Tensor:
        """Return labels int64 [b]; the null label where there is none, or where it is withheld."""
        u = uniform(self._settings.seed, "label dropout", batch.positions)
        withheld = (batch.labels < 0) | (u < self._settings.flow.label_dropout)
        return torch.where(withheld, self._null_label, batch.labels)

    def describe(self, positions: Tensor) -> str:
        """Return the times drawn for samples whose loss is not finite."""
        return f"t {[round(t, 4) for t in self.times(positions).tolist()]}"

    def save_snapshot(
        self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float, write: bool = True
    ) -> None:
        """Write weights to use."""
        save_snapshot(
            path,
            weights,
            config=self.model.config,
            normalizer=self.normalizer,
            meta=replace(self._parts.snapshot_meta(step, ema_rate), teacher=self.facts.get("teacher")),
            write=write,
        )

    def render_samples(self, path: Path) -> None:
        """Write a sheet of generated images, if there is a decoder to render them with."""
        if self._parts.render is not None:
            self._parts.render(self.model, self.normalizer, path)

    def evaluate(self) -> dict[str, float]:
        """Return the FID of a few samples."""
        return {} if self._parts.fid is None else {"fid": self._parts.fid(self.model, self.normalizer)}
