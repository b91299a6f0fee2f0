"""Consistency mid-training (CMT): the network learns the average velocities of a teacher's trajectories.

A sample of the stream is a trajectory from noise; nothing is read of it but its label.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.feed import MicroBatch
from train.engine.task import Losses
from train.flow.integrators import time_grid
from train.flow.mean_flow import average_between, state_times, trajectory, trajectory_pairs
from train.flow.path import per_sample_loss
from train.randomness import normal, uniform
from train.tasks.bands import band_names, sums_by_band
from train.tasks.parts import DiTParts
from train.tasks.teacher import load_teacher
from train.tasks.velocity import VelocityTask

ERROR_BY_TIME = band_names("error_t")
"""Squared error of all pairs, in bands of the time t of their start."""
ERROR_BY_GAP = band_names("error_gap")
"""Squared error of all pairs, in bands of their length t − r."""


class MidTrainingTask(VelocityTask):
    """A two-time network and straight lines between states of a teacher: `train/dit.py --objective mid-training`."""

    metric_names: ClassVar[tuple[str, ...]] = (*ERROR_BY_TIME, *ERROR_BY_GAP)
    fields: tuple[str, ...] = ()

    def __init__(self, parts: DiTParts) -> None:
        super().__init__(parts)
        settings, device = parts.settings.mid_training, parts.normalizer.variance.device
        self._teacher = load_teacher(parts)
        self.facts = self._teacher.facts
        self._grid = time_grid(settings.points, self._shift, settings.grid)
        self._state_times = state_times(self._grid, settings.labels).to(device)
        self._all_pairs = trajectory_pairs(settings.points).to(device)

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return mean squared error over each trajectory's pairs."""
        settings, seed = self._settings.mid_training, self._settings.seed
        config = self.model.config
        noise = normal(seed, "noise", batch.positions, (config.token_width, *config.grid))
        y = self.labels(batch)
        states = trajectory(self._teacher.field(y), noise, self._grid, settings.method)
        pairs = self._all_pairs[self.pair_numbers(batch.positions).flatten()]
        rows = torch.arange(len(noise), device=noise.device).repeat_interleave(settings.pairs)
        start, t, r, target = average_between(states, self._state_times, pairs, rows)
        error, *base = (
            per_sample_loss(average, target)
            for average in self.as_velocities(model(start, t, y[rows], r=r), start, t)
        )
        apart = error.detach()
        for base_error in base:
            error = error + self._settings.flow.base_weight * base_error
        metrics = {
            **sums_by_band(ERROR_BY_TIME, apart, t),
            **sums_by_band(ERROR_BY_GAP, apart, t - r),
        }
        return Losses(error.view(len(noise), settings.pairs).mean(dim=1), metrics)

    def pair_numbers(self, positions: Tensor) -> Tensor:
        """Return which of all pairs were drawn for each trajectory, with replacement: int64 [b, pairs]."""
        u = uniform(self._settings.seed, "pair", positions, (self._settings.mid_training.pairs,))
        return (u * len(self._all_pairs)).long()

    def describe(self, positions: Tensor) -> str:
        """Return the first pairs drawn for trajectories whose loss is not finite."""
        return f"pairs {[numbers[:4] for numbers in self.pair_numbers(positions).tolist()]}"
