"""From sample numbers to latents: noise, label, guidance and integration of each sample, by its number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eval.generate.labels import labels_of
from eval.networks.load import autocast
from eval.settings import GridKind, Guidance, LabelRule, Precision
from train.flow.guidance import Halves, Model, auto_guidance, classifier_free, internal, unguided
from train.flow.integrators import OnStep, Velocity, integrate, time_grid
from train.flow.mean_flow import jump
from train.flow.path import Prediction, as_velocities, time_shift
from train.randomness import normal


@dataclass(frozen=True, kw_only=True)
class LatentSampler:
    """Samples the latents of numbered samples.

    Sample i is the same, up to the rounding of matrix products, for any batch it is computed in.
    """

    model: nn.Module
    """The DiT, in evaluation mode."""
    guide: nn.Module | None = None
    """The weaker DiT, for autoguidance."""
    latent_shape: tuple[int, int, int]
    """Channels, rows and columns (D, h, w)."""
    num_classes: int
    """Also the label that means no class."""
    classes: tuple[int, ...]
    """Classes to show."""
    labels: LabelRule = "equal"
    seed: int = 0
    kind: GridKind = "published"
    points: int = 50
    method: str = "euler"
    """euler, heun, a torchdiffeq solver, or jump, which needs a model that takes the end of a jump."""
    shift_base: int = 4096
    """Numbers in a latent for which times are not shifted; as in training."""
    guidance: Guidance = "none"
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    internal_scale: float | None = None
    """Internal guidance beneath another."""
    internal_interval: tuple[float, float] = (0.0, 1.0)
    unconditional_scale: float | None = None
    """Internal guidance of the prediction without a class; None: as of the other."""
    prediction: Prediction = "velocity"
    """What the model puts out; also its guide."""
    time_floor: float = 0.0
    """Least time that predicted data is divided by."""
    precision: Precision = "fp32"
    halves: Halves = "joined"
    """How classifier-free guidance calls the model; separate where it is compiled, so that it sees one batch size."""

    @torch.inference_mode()
    def latents(self, numbers: Tensor, on_step: OnStep | None = None) -> Tensor:
        """Return normalised latents float32 [B, D, h, w] of samples `numbers`, int64 [B] on the device to use.

        The host queues all of it and waits for nothing, unless the method is one of torchdiffeq's.
        """
        noise = normal(self.seed, "generation", numbers, self.latent_shape)
        labels = labels_of(numbers, self.classes, self.labels, self.seed)
        if self.method == "jump":
            return jump(self._average_velocity, noise, labels, self.grid, on_step=on_step)
        return integrate(self._velocity(labels), noise, self.grid, self.method, on_step=on_step)

    @property
    def grid(self) -> Tensor:
        """Times from noise toward data, float32 [points]."""
        if self.kind == "uniform":
            return time_grid(self.points, 1.0, "to-zero")
        return time_grid(self.points, time_shift(math.prod(self.latent_shape), self.shift_base), self.kind)

    def evaluations(self) -> int:
        """Count the model calls that one sample needs with a fixed-step solver; calls of a guiding model are extra."""
        return (self.points - 1) * (2 if self.method == "heun" else 1)

    def _velocity(self, labels: Tensor) -> Velocity:
        model = self._guided_by_itself()
        if self.guidance == "cfg":
            return classifier_free(
                model,
                labels,
                self.scale,
                null_label=self.num_classes,
                interval=self.interval,
                halves=self.halves,
            )
        if self.guidance == "autoguidance":
            assert self.guide is not None, "autoguidance needs a guide"
            return auto_guidance(model, self._called(self.guide), labels, self.scale, interval=self.interval)
        return unguided(model, labels)

    def _guided_by_itself(self) -> Model:
        scale, interval = self.internal_scale, self.internal_interval
        if self.guidance == "internal":
            scale, interval = self.scale, self.interval
        if scale is None:
            return self._called(self.model)

        def both(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            full, base = self._velocities(self.model, x, t, y)
            return full, base

        return internal(
            both,
            scale,
            null_label=self.num_classes,
            unconditional_scale=self.unconditional_scale,
            interval=interval,
        )

    def _called(self, network: nn.Module) -> Model:
        return lambda x, t, y: self._velocities(network, x, t, y)[0]

    def _velocities(self, network: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Return the velocity of a network's output and, if it has a base output, that one's."""
        with autocast(x.device, self.precision):
            outputs = network(x, t, y)
        return as_velocities(outputs, x, t, self.prediction, self.time_floor)

    def _average_velocity(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor) -> Tensor:
        with autocast(x.device, self.precision):
            outputs = self.model(x, t, y, r=r)
        return as_velocities(outputs, x, t, self.prediction, self.time_floor)[0]
