"""Mean flows: the network learns the average velocity between two times, from a teacher or from the data alone.

With a teacher this is MF-RAE's distillation (MFD), without one its fine-tuning (MFT); they differ in one line, the
velocity.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.arithmetic import whole_float32
from train.engine.feed import MicroBatch
from train.engine.task import Losses, sum_and_count
from train.flow.mean_flow import (
    adaptive_loss,
    average_velocity_target,
    difference_quotient,
    draw_times,
    most_jumps,
    random_jumps,
    rows_first,
    spread_jumps,
)
from train.flow.path import interpolate, velocity_target
from train.randomness import normal, uniform
from train.tasks.bands import band_names, sums_by_band
from train.tasks.parts import DiTParts
from train.tasks.teacher import load_teacher
from train.tasks.velocity import VelocityTask

ERROR_BY_TIME = band_names("error_t")
"""Squared error where r = t, in bands of t: how well the network is a velocity field."""
ERROR_BY_GAP = band_names("error_gap")
"""Squared error of jumps, in bands of their length t − r."""


class MeanFlowTask(VelocityTask):
    """A two-time network and the mean-flow identity: `train/dit.py --objective mean-flow`."""

    metric_names: ClassVar[tuple[str, ...]] = (
        *ERROR_BY_TIME,
        *ERROR_BY_GAP,
        "velocity_rms",
        "derivative_rms",
    )

    def __init__(self, parts: DiTParts) -> None:
        super().__init__(parts)
        self._mean_flow = parts.settings.mean_flow
        self._teacher = None
        if parts.settings.teacher is not None:
            self._teacher = load_teacher(parts)
            self.facts = self._teacher.facts

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return the adaptive loss of each sample; what is logged as the loss is the mean squared error."""
        settings = self._mean_flow
        data = self._latents(batch.fields["tokens"])
        noise = normal(self._settings.seed, "noise", batch.positions, tuple(data.shape[1:]))
        t, r = self.spans(batch.positions)
        y = self.labels(batch)
        x_t = interpolate(data, noise, t)
        velocity = velocity_target(data, noise) if self._teacher is None else self._teacher.field(y)(x_t, t)
        rows = rows_first(r < t, self._num_jumps(r < t))
        derivative = self._derivative(*(values[rows] for values in (x_t, t, r, velocity, y)))
        target = average_velocity_target(
            velocity, t, r, torch.zeros_like(velocity).index_copy(0, rows, derivative)
        )
        (loss, squared_error), *base = (
            adaptive_loss(average, target, power=settings.power, constant=settings.constant)
            for average in self.as_velocities(model(x_t, t, y, r=r), x_t, t)
        )
        for base_loss, _ in base:
            loss = loss + self._settings.flow.base_weight * base_loss
        error = squared_error / data[0].numel()
        return Losses(loss, self._metrics(error, t, r, velocity, derivative, rows), logged=error)

    def spans(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Start t and end r of the jumps drawn for samples, float32 [b] each; r = t where there is none."""
        seed, flow, settings = self._settings.seed, self._settings.flow, self._mean_flow
        if settings.jumps == "spread":
            jumps = spread_jumps(positions, settings.share)
        else:
            jumps = random_jumps(uniform(seed, "jump", positions), settings.share)
        u = uniform(seed, "times", positions, (2,))
        return draw_times(u, jumps, flow.time_distribution, mu=flow.mu, sigma=flow.sigma, shift=self._shift)

    def describe(self, positions: Tensor) -> str:
        """Return the times drawn for samples whose loss is not finite."""
        spans = zip(*(times.tolist() for times in self.spans(positions)), strict=True)
        return ", ".join(f"t {t:.4f} r {r:.4f}" for t, r in spans)

    def _num_jumps(self, jumps: Tensor) -> int:
        """Return how many rows' derivative is computed: one number, or a few, so that the compiler meets few sizes."""
        batch, settings = len(jumps), self._mean_flow
        if settings.jumps == "spread":
            return most_jumps(batch, settings.share)
        part = -(-batch // 4)
        return min(batch, -(-int(jumps.sum()) // part) * part)

    def _derivative(self, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, y: Tensor) -> Tensor:
        """Return du/dt in an arithmetic of its own, by the network itself: what wraps it is for calls with gradient."""
        with torch.no_grad(), whole_float32(x_t.device, tf32=self._mean_flow.derivative == "tf32"):
            return difference_quotient(
                self._average_velocity, x_t, t, r, velocity, labels=(y, y), delta=self._mean_flow.delta
            )

    def _average_velocity(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return self.as_velocities(self.model(x_t, t, y, r=r), x_t, t)[0]

    def _metrics(
        self, error: Tensor, t: Tensor, r: Tensor, velocity: Tensor, derivative: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        jumps = (r < t).to(error.dtype)
        learnt = jumps[rows]
        sizes = learnt * _rms(derivative)
        return {
            **sums_by_band(ERROR_BY_TIME, error, t, weights=1 - jumps),
            **sums_by_band(ERROR_BY_GAP, error, t - r, weights=jumps),
            "velocity_rms": sum_and_count(_rms(velocity)),
            "derivative_rms": torch.stack([sizes.sum(), learnt.sum()]),
        }


def _rms(values: Tensor) -> Tensor:
    """Return the root of the mean square of each row, [b, ...] → [b]."""
    return values.square().flatten(1).mean(dim=1).sqrt()
