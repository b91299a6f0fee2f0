"""Mean flows: the average velocity over a span of time, with which one evaluation jumps from noise to data.

t = 0 is data, t = 1 is noise. Of two times r ≤ t, t is where a state is and r where the jump from it ends:

    u(x_t, t, r) = 1 / (t − r) · ∫ v dτ from r to t,    x_r = x_t − (t − r) · u(x_t, t, r),    u(x, t, t) = v(x, t).

Three ways to learn u, in the order in which MF-RAE uses them:

- consistency mid-training (CMT) regresses u on straight lines between two states of one trajectory of a teacher;
- distillation (MFD) fulfils the identity u = v − (t − r) · du/dt along the path, with v from a teacher;
- fine-tuning (MFT) does the same with v = noise − data.

Nothing here knows a network or a store: a network is any callable `AverageVelocity`.

Source: arXiv 2505.13447 (the identity), arXiv 2511.13019 (on RAE latents), github:sony/mf-rae
src/stage2/transport/transport.py at fffc544 (every choice of numbers below).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from shards import UsageError
from train.flow.integrators import OnStep, Velocity, integrate
from train.flow.path import TimeDistribution, draw_time

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""u(x_t [B, D, h, w], t float [B], y int64 [B], r float [B]) -> average velocity from t to r, [B, D, h, w]."""

PairLabels = Literal["true", "published"]
"""Which times the states of a trajectory are said to be at; see `state_times`."""

_SHARE_DENOMINATOR = 1 << 16


def draw_times(
    u: Tensor,
    jumps: Tensor,
    distribution: TimeDistribution = "uniform",
    *,
    mu: float = 0.0,
    sigma: float = 1.0,
    shift: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return pairs of times for training: t is the later of two draws, r the earlier for a jump, else t.

    Source: Transport.sample_mf.

    Args:
        u: two uniform draws a sample, float [B, 2] in [0, 1).
        jumps: which samples learn a jump, bool [B].
        distribution: of each draw before the shift; see `train.flow.path.draw_time`.
        mu: mean of the logit-normal's logit.
        sigma: standard deviation of the logit-normal's logit.
        shift: see `train.flow.path.time_shift`.

    Returns:
        t and r, float32 [B] each.
    """
    times = draw_time(u, distribution, mu=mu, sigma=sigma, shift=shift)
    t, r = times.amax(dim=1), times.amin(dim=1)
    return t, torch.where(jumps, r, t)


def random_jumps(u: Tensor, share: float) -> Tensor:
    """Return which samples learn a jump, each drawn independently, as published: bool [B] of uniform draws u [B]."""
    return u >= 1 - share


def spread_jumps(positions: Tensor, share: float) -> Tensor:
    """Return which samples learn a jump, spread evenly over the stream of samples.

    Of any b consecutive positions ⌊b · share⌋ or ⌈b · share⌉ are jumps (see `most_jumps`), so that what is computed for
    jumps alone has one size. Integer arithmetic: the same on every device.

    Args:
        positions: places in the stream, int64 [B].
        share: share of jumps in [0, 1].

    Returns:
        bool [B].
    """
    parts = round(share * _SHARE_DENOMINATOR)
    whole, rest = positions // _SHARE_DENOMINATOR, positions % _SHARE_DENOMINATOR
    before = whole * parts + rest * parts // _SHARE_DENOMINATOR
    after = whole * parts + (rest + 1) * parts // _SHARE_DENOMINATOR
    return after > before


def most_jumps(batch: int, share: float) -> int:
    """Return most jumps among `batch` consecutive positions of `spread_jumps`."""
    parts = Fraction(round(share * _SHARE_DENOMINATOR), _SHARE_DENOMINATOR)
    return -(-batch * parts.numerator // parts.denominator)


def rows_first(jumps: Tensor, count: int) -> Tensor:
    """Return numbers int64 [count] of rows, those of jumps bool [B] first, then others to fill up."""
    return torch.argsort(jumps, descending=True, stable=True)[:count]


def difference_quotient(
    u: AverageVelocity,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    velocity: Tensor,
    labels: tuple[Tensor, Tensor],
    delta: float,
) -> Tensor:
    """Return du/dt along the path: state and time move together, the end r stays.

    The central difference (u(x + δv, t + δ, r) − u(x − δv, t − δ, r)) / 2δ. Times are not clamped: t + δ may pass 1,
    t − δ may be negative or below r. Both sides are one batch, because the quotient multiplies by 1 / 2δ whatever two
    batches would round differently.

    Args:
        u: the network, computed in float32: TF32 gives an error of 2–3 %, bfloat16 of 24–49 % at δ = 0.005.
        x_t: states [B, ...].
        t: their times, float [B].
        r: where the jumps end, float [B].
        velocity: dx/dt at (x_t, t), as `x_t`.
        labels: of the call ahead and of the call behind, int64 [B] each; the same but for old recordings.
        delta: δ.

    Returns:
        As `x_t`.
    """
    ahead, behind = (
        u(
            torch.cat([x_t + delta * velocity, x_t - delta * velocity]),
            torch.cat([t + delta, t - delta]),
            torch.cat(labels),
            torch.cat([r, r]),
        )
    ).chunk(2)
    return (ahead - behind) / (2 * delta)


def average_velocity_target(velocity: Tensor, t: Tensor, r: Tensor, derivative: Tensor) -> Tensor:
    """Return the mean-flow identity's right side, v − (t − r) · du/dt, as `velocity` [B, ...], without gradient."""
    return (velocity - _like(t - r, velocity) * derivative).detach()


def adaptive_loss(
    prediction: Tensor, target: Tensor, *, power: float = 1.0, constant: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return the loss of mean flows: L² weighted by 1 / (L² + constant)^power, where L is the sum of squared errors.

    The weight has no gradient. With power 1 the loss is 1 whatever the prediction, and its gradient that of 2 · ln L;
    only the squared error tells how well the network does. MeanFlow's own form, L / (L + constant), has half of
    this gradient.

    Args:
        prediction: [B, ...].
        target: as `prediction`.
        power: 0: L² itself; 0.5: L; 1: the logarithm's gradient, as published.
        constant: keeps the weight finite.

    Returns:
        Loss and squared error L (detached), float32 [B] each.
    """
    squared_error = (prediction.float() - target.float()).square().flatten(1).sum(dim=1)
    square = squared_error.square()
    weight = 1 / (square.detach() + constant) ** power
    return weight * square, squared_error.detach()


def trajectory(velocity: Velocity, noise: Tensor, grid: Tensor, method: str = "euler") -> Tensor:
    """Return the states of a teacher's trajectory at the times of a grid, without gradient.

    Args:
        velocity: the teacher's field.
        noise: state [B, ...] at `grid[0]`.
        grid: times float [n], falling.
        method: "euler" or "heun".

    Returns:
        [n, B, ...], the noise first.
    """
    states = [noise]
    integrate(velocity, noise, grid, method, on_step=lambda _step, _time, state: states.append(state))
    return torch.stack(states)


def trajectory_pairs(points: int) -> Tensor:
    """Return all pairs (i, j), i > j, of a trajectory's states, counted from the clean end.

    Source: Transport.training_losses_cmt_v2, whose order this is: j runs faster.

    Args:
        points: states n.

    Returns:
        int64 [n (n − 1) / 2, 2].
    """
    return torch.tril_indices(points, points, offset=-1).T


def state_times(grid: Tensor, labels: PairLabels) -> Tensor:
    """Return the times the states of a trajectory are said to be at, counted from the clean end.

    Source: Transport.training_losses_cmt_v2 labels states at shifted times with unshifted ones, from 0 to 1; up to 0.45
    (256 pixels) or 0.58 (512 pixels) beside the time at which a state lies.

    Args:
        grid: times of the trajectory, float [n], falling.
        labels: "true", where they are; "published", evenly spread over [0, 1].

    Returns:
        float64 [n], rising.
    """
    if labels == "true":
        return grid.double().flip(0)
    return torch.linspace(0, 1, len(grid), dtype=torch.float64, device=grid.device)


def average_between(states: Tensor, times: Tensor, pairs: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the target of consistency mid-training: the average velocity between two states of one trajectory.

    Args:
        states: trajectories [n, B, ...], the noise first.
        times: what `state_times` gives, [n].
        pairs: (i, j) of each pair, counted from the clean end, int64 [P, 2].
        rows: which trajectory each pair is of, int64 [P].

    Returns:
        Start [P, ...], its time t and the end's time r, float32 [P], and (start − end) / (t − r), as the start.
    """
    last = len(states) - 1
    start, end = (states[last - pairs[:, side], rows] for side in (0, 1))
    t, r = (times[pairs[:, side]] for side in (0, 1))
    return start, t.float(), r.float(), (start - end) / _like((t - r).to(start.dtype), start)


@torch.no_grad()
def jump(
    u: AverageVelocity, noise: Tensor, y: Tensor, grid: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Jump from noise to data in as many evaluations as the grid has steps: x ← x − (t − r) · u(x, t, r).

    Source: the few-step branch of src/sample_ddp_mf_512.py in github:sony/mf-rae at fffc544, whose grids are those of
    `train.flow.integrators.time_grid` without shift, "to-zero".

    Args:
        u: the network.
        noise: state [B, ...] at `grid[0]`, kept in its own type.
        y: labels int64 [B].
        grid: times float [n + 1], falling; on the host, so that no device is waited for.
        on_step: called after each step.

    Returns:
        State at `grid[-1]`, as `noise`.

    Raises:
        UsageError: the grid does not fall.
    """
    if len(grid) < 2 or not bool((grid[1:] < grid[:-1]).all()):
        raise UsageError(f"jumps go from later to earlier times; got the grid {grid.tolist()}")
    times, lengths = grid.tolist(), (-grid.diff()).tolist()
    state = noise
    for step, length in enumerate(lengths):
        t, r = (
            torch.full((len(state),), time, dtype=grid.dtype, device=state.device)
            for time in times[step : step + 2]
        )
        average = u(state, t, y, r)
        state = state - length * average.to(state.dtype)
        if on_step is not None:
            on_step(step + 1, grid[step + 1], state)
    return state


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values [B] shaped to multiply a tensor [B, ...]."""
    return values.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
