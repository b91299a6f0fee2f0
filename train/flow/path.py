"""Flow matching between data and noise on a straight line.

t = 0 is data, t = 1 is noise: x_t = (1 − t) · data + t · noise, and the velocity along the line is noise −
data.

Source: arXiv 2210.02747, arXiv 2209.03003; github:bytetriper/RAE src/stage2/transport at a4d18c4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TimeDistribution = Literal["uniform", "logit-normal"]

Prediction = Literal["velocity", "x"]
"""What a network puts out: the velocity, or the data."""

MAX_TIME = 1 - 1 / 1000
"""Latest time before the shift, in training and on the published sampling grid.

Source: Transport.check_interval in github:bytetriper/RAE src/stage2/transport/transport.py at a4d18c4.
"""


def time_shift(dim: int, base: int = 4096) -> float:
    """Return how far to move times toward noise for a latent of `dim` numbers: √(dim / base).

    A latent with more numbers keeps more of its signal at the same t, so the same difficulty is at later
    times. 768 channels on 16×16 give √48 = 6.928, on 32×32 √192 = 13.856.

    Source: arXiv 2510.11690 section 4 (dimension-dependent schedule shift); arXiv 2403.03206 section 5.3.2.

    Args:
        dim: D · h · w.
        base: numbers in the latent for which no shift is needed.
    """
    return math.sqrt(dim / base)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times toward noise: t' = s·t / (1 + (s − 1)·t), which keeps 0 and 1. Source: as `time_shift`."""
    return shift * t / (1 + (shift - 1) * t)


def draw_time(
    u: Tensor,
    distribution: TimeDistribution = "logit-normal",
    *,
    mu: float = 0.0,
    sigma: float = 1.0,
    shift: float = 1.0,
    latest: float = MAX_TIME,
) -> Tensor:
    """Map uniform draws to training times, one each, by the distribution's inverse.

    Source: Transport.sample and truncated_logitnormal_sample in github:bytetriper/RAE
    src/stage2/transport/transport.py at a4d18c4; logit-normal times: arXiv 2403.03206 section 3.1.

    Args:
        u: float [B] in [0, 1).
        distribution: "uniform" on [0, latest], or "logit-normal", a normal through a sigmoid, cut off at `latest`.
        mu: mean of the logit-normal's logit.
        sigma: standard deviation of the logit-normal's logit, positive.
        shift: see `time_shift`; 1 leaves times where they are.
        latest: latest time before the shift; 1 cuts nothing off.

    Returns:
        float32 [B], in [0, 1), in [0, 1] if nothing is cut off.
    """
    if distribution == "uniform":
        return shift_time(u.float() * latest, shift)
    # In float64, because float32 has no numbers left between the tail of the normal and 1.
    cut = math.inf if latest >= 1 else (math.log(latest / (1 - latest)) - mu) / sigma
    share = u.double() * (0.5 * (1 + math.erf(cut / math.sqrt(2))))
    logit = mu + sigma * torch.special.ndtri(share)
    return shift_time(torch.sigmoid(logit).clamp(0, latest).float(), shift)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the point at time t on the line from data to noise: (1 − t) · data + t · noise.

    Args:
        data: [B, ...].
        noise: as `data`.
        t: float [B] in [0, 1].

    Returns:
        x_t, as `data`.
    """
    return torch.lerp(data, noise, t.to(data.dtype).reshape(-1, *[1] * (data.ndim - 1)))


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity along the line, dx_t/dt = noise − data."""
    return noise - data


def velocity_from_data(x_t: Tensor, data: Tensor, t: Tensor, floor: float) -> Tensor:
    """Return the velocity that leads from x_t to predicted data: (x_t − data) / max(t, floor).

    Source: arXiv 2511.13720; the floor: github:noctrog/flatdino train_generator.py at cdd398f (1 / (50 shift)).

    Args:
        x_t: state [B, ...].
        data: predicted data, as `x_t`.
        t: float [B] in [0, 1].
        floor: least time divided by, above 0.
    """
    return (x_t - data) / t.clamp(min=floor).to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))


def as_velocity(
    output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction = "velocity", floor: float = 0.0
) -> Tensor:
    """Convert a network's output [B, ...] at x_t and t to a velocity; data as in `velocity_from_data`."""
    return output if prediction == "velocity" else velocity_from_data(x_t, output, t, floor)


def as_velocities(
    outputs: Tensor | tuple[Tensor, ...],
    x_t: Tensor,
    t: Tensor,
    prediction: Prediction = "velocity",
    floor: float = 0.0,
) -> list[Tensor]:
    """`as_velocity` of each of a network's outputs, float32: the full one and, if it has a base output, that one."""
    each = outputs if isinstance(outputs, tuple) else (outputs,)
    return [as_velocity(output.float(), x_t, t, prediction, floor) for output in each]


def velocity_loss(
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    prediction: Prediction = "velocity",
    floor: float = 0.0,
) -> Tensor:
    """Return the squared error of the velocity that follows from a network's output, a sample: float32 [B].

    The target is (x_t − data) / max(t, floor): noise − data wherever t is not below the floor, and less below it. So
    for predicted data the error is that of the data, divided by max(t, floor)².

    Source: arXiv 2605.18324; github:nanovisionx/RAEv2 src/stage2/transport/transport.py at 8a0d238.

    Args:
        output: what the network put out, [B, ...].
        data: [B, ...].
        noise: as `data`.
        t: float [B] in [0, 1].
        prediction: what `output` is.
        floor: least time divided by; 0 for none, which x does not allow.
    """
    if prediction == "x":
        return per_sample_loss(output, data) / t.clamp(min=floor).square()
    target = velocity_target(data, noise)
    if floor > 0:
        # x_t − data is t · (noise − data).
        target = target * (t / t.clamp(min=floor)).reshape(-1, *[1] * (data.ndim - 1))
    return per_sample_loss(output, target)


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return squared error, mean over all but the first dimension, in float32: [B, ...] → [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
