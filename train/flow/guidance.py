"""Guidance: push the velocity away from that of a worse prediction.

Guided by scale w inside a closed interval of times [low, high]: v = worse + w · (v − worse); outside it the
model's own v. `classifier_free` and `auto_guidance` turn a model and a batch of labels into a velocity field for
`train.flow.integrators.integrate`; `internal` turns a model with a base output into a guided model, which either can
take. As the weights sum to 1, it does not matter whether velocities are combined or the data they lead to.

Whether a time is in the interval is decided on the host where all samples share it (`Guided.at`): outside, the worse
prediction is not computed, and no step waits for a device to say where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shards import UsageError
from train.flow.integrators import Velocity

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""model(x_t [B, D, h, w], t float [B], y int64 [B]) -> velocity [B, D, h, w]."""

TwoOutputs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""model(x_t [B, D, h, w], t float [B], y int64 [B]) -> velocity and the base output's velocity, [B, D, h, w] each."""

Halves = Literal["joined", "separate"]
"""How classifier-free guidance calls its model: once with a batch of twice the size, which keeps a device busy that a
batch alone does not fill; or twice with the batch, which takes half of the memory and is one shape for the compiler,
inside of the interval and outside."""

ALWAYS = (0.0, 1.0)
"""The interval that is every time."""


@dataclass(frozen=True, kw_only=True)
class Guided:
    """A guided velocity field.

    Attributes:
        own: the model's own velocity.
        both: that and the worse prediction's, of the same (x, t).
        scale: w.
        interval: times (low, high) at which to guide, ends included.
    """

    own: Velocity
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float
    interval: tuple[float, float]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Guide samples that have times t float [B] of their own, [B, ...]; costs both predictions."""
        better, worse = self.both(x, t)
        return _extrapolate_inside(better, worse, self.scale, _inside(t, self.interval))

    def at(self, time: float) -> Velocity:
        """Return the field at a time that all samples share; outside of the interval it costs one prediction."""
        return self._guided if bool(_inside(torch.tensor(time), self.interval)) else self.own

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        better, worse = self.both(x, t)
        return _extrapolate(better, worse, self.scale)


def unguided(model: Model, y: Tensor) -> Velocity:
    """Return the model's own velocity for labels y int64 [B]."""
    return lambda x, t: model(x, t, y)


def classifier_free(
    model: Model,
    y: Tensor,
    scale: float,
    *,
    null_label: int,
    interval: tuple[float, float] = ALWAYS,
    halves: Halves = "joined",
) -> Velocity:
    """Return classifier-free guidance: the worse prediction is the model's own without a class.

    Source: arXiv 2207.12598; the interval: arXiv 2404.07724; DiTwDDTHead.forward_with_cfg in
    github:bytetriper/RAE src/stage2/models/DDT.py at a4d18c4.

    Args:
        model: a model trained with label dropout, in evaluation mode.
        y: labels int64 [B].
        scale: w ≥ 1; 1 is no guidance and costs none.
        null_label: the label that means no class, `num_classes`.
        interval: times (low, high) at which to guide, ends included.
        halves: how the predictions with and without a class are computed.

    Raises:
        UsageError: scale below 1, or an interval without extent.
    """
    _check(scale, interval)
    if scale == 1:
        return unguided(model, y)
    nothing = torch.full_like(y, null_label)

    def joined(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with_class, without = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nothing])).chunk(2)
        return with_class, without

    def separate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, t, y), model(x, t, nothing)

    both = joined if halves == "joined" else separate
    return Guided(own=unguided(model, y), both=both, scale=scale, interval=interval)


def auto_guidance(
    model: Model, guide: Model, y: Tensor, scale: float, *, interval: tuple[float, float] = ALWAYS
) -> Velocity:
    """AutoGuidance: the worse prediction is a smaller or less trained model's for the same class.

    The published runs use an early DiT-DH-S as guide, with scale 1.42 at 256 and 1.5 at 512 pixels.

    Source: arXiv 2406.02507; DiTwDDTHead.forward_with_autoguidance in github:bytetriper/RAE
    src/stage2/models/DDT.py at a4d18c4, and its configs/stage2/sampling.

    Args:
        model: the model, in evaluation mode.
        guide: the worse model, in evaluation mode.
        y: labels int64 [B].
        scale: w ≥ 1; 1 is no guidance and costs none.
        interval: times (low, high) at which to guide, ends included.

    Raises:
        UsageError: scale below 1, or an interval without extent.
    """
    _check(scale, interval)
    if scale == 1:
        return unguided(model, y)

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, t, y), guide(x, t, y)

    return Guided(own=unguided(model, y), both=both, scale=scale, interval=interval)


def internal(
    model: TwoOutputs,
    scale: float,
    *,
    null_label: int,
    unconditional_scale: float | None = None,
    interval: tuple[float, float] = ALWAYS,
) -> Model:
    """Build internal guidance: the worse prediction is the model's own base output, from the same forward pass.

    Source: arXiv 2605.18324; github:nanovisionx/RAEv2 src/utils/guidance_utils.py at 8a0d238, whose published
    evaluation takes scale 1.78 in [0.1, 1]. Its project page writes full + w · (full − base), so its w is scale − 1.

    Args:
        model: a model with a base output, in evaluation mode.
        scale: w ≥ 1; 1 is no guidance and costs nothing either.
        null_label: the label that means no class.
        unconditional_scale: w, 0 or more, where the label is `null_label`, which classifier-free guidance asks for too;
            None: `scale`.
        interval: times (low, high) at which to guide, ends included.

    Raises:
        UsageError: scale below 1, or an interval without extent.
    """
    _check(scale, interval)

    def guided_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        full, base = model(x, t, y)
        weight = torch.full_like(t, scale)
        if unconditional_scale is not None:
            weight = torch.where(y == null_label, unconditional_scale, weight)
        weight = weight.to(full.dtype).view(-1, *[1] * (full.ndim - 1))
        return _extrapolate_inside(full, base, weight, _inside(t, interval))

    return guided_model


def _inside(t: Tensor, interval: tuple[float, float]) -> Tensor:
    low, high = interval
    return (t >= low) & (t <= high)


def _extrapolate(better: Tensor, worse: Tensor, scale: float | Tensor) -> Tensor:
    return worse + scale * (better - worse)


def _extrapolate_inside(better: Tensor, worse: Tensor, scale: float | Tensor, inside: Tensor) -> Tensor:
    guided = _extrapolate(better, worse, scale)
    return torch.where(inside.view(-1, *[1] * (better.ndim - 1)), guided, better)


def _check(scale: float, interval: tuple[float, float]) -> None:
    if scale < 1:
        raise UsageError(f"a guidance scale must be at least 1, which is no guidance; got {scale}")
    if not interval[0] < interval[1]:
        raise UsageError(f"a guidance interval must be (low, high) with low < high; got {interval}")
