"""From noise to data: integrate a velocity from t = 1 down.

Source: github:bytetriper/RAE src/stage2/transport/integrators.py at a4d18c4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from shards import UsageError
from train.flow.path import MAX_TIME, shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity(x [B, ...], t float [B]) -> dx/dt [B, ...]."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(number of steps done, t float [], x [B, ...])."""


@runtime_checkable
class TimedVelocity(Protocol):
    """A velocity that costs more at some times than at others, as guidance does."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity where each sample has a time t float [B] of its own."""
        ...

    def at(self, time: float) -> Velocity:
        """Return the velocity at a time that all samples share, which the host knows: no device is asked for it."""
        ...


GridKind = Literal["published", "to-zero"]

OWN_METHODS = ("euler", "heun")
FIXED_METHODS = ("midpoint", "rk4", "heun3")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
METHODS = (*OWN_METHODS, *FIXED_METHODS, *ADAPTIVE_METHODS)
"""All names `integrate` takes; those but the first two are torchdiffeq's.

Its explicit_adams and fehlberg2 are left out: in 0.2.5 they miss e⁻¹ by a tenth where Euler misses it by a hundredth.
"""


def time_grid(num_points: int, shift: float, kind: GridKind = "published") -> Tensor:
    """Return the times at which the state is computed, from noise toward data.

    "published" is the grid behind the published scores: evenly from 1 to 0.001, then shifted. Its last time
    is not 0 (0.00689 for 768×16×16) and there is no last step to 0, so 50 points are 49 steps. "to-zero" is
    the same with an even grid from 1 to 0, and ends on the data.

    Source: class ode in github:bytetriper/RAE src/stage2/transport/integrators.py at a4d18c4.

    Args:
        num_points: points, at least 2; one more than there are steps.
        shift: see `train.flow.path.time_shift`.
        kind: which grid.

    Returns:
        float32 [num_points], falling.
    """
    if num_points < 2:
        raise UsageError(f"a time grid needs at least 2 points; got {num_points}")
    end = MAX_TIME if kind == "published" else 1.0
    # Rounding puts some shifted ends above 1, outside of a guidance interval that ends there.
    return shift_time(1 - torch.linspace(0, end, num_points), shift).clamp_(max=1.0)


@torch.no_grad()
def integrate(
    velocity: Velocity,
    noise: Tensor,
    grid: Tensor,
    method: str = "euler",
    *,
    on_step: OnStep | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> Tensor:
    """Follow a velocity field over a grid of times.

    "euler" and "heun" do not wait for the device where the grid is on the host, so that a GPU finds the next
    step's kernels queued whenever it ends one. torchdiffeq's methods keep times on the device and do wait.

    Args:
        velocity: the field.
        noise: state [B, ...] at `grid[0]`, kept in its own type throughout.
        grid: times float [n], rising or falling, best on the host.
        method: "euler" (one evaluation a step), "heun" (two), or a method of torchdiffeq: fixed steps on the grid
            (`FIXED_METHODS`) or steps of its own choice between the ends (`ADAPTIVE_METHODS`).
        on_step: called after each step of "euler" and "heun"; torchdiffeq's methods call it once, at the end.
        atol: absolute error a step, adaptive methods only. Source: Sampler.sample_ode's default.
        rtol: relative error a step, adaptive methods only. Source: Sampler.sample_ode's default.

    Returns:
        State at `grid[-1]`, as `noise`.

    Raises:
        UsageError: no such method.
    """
    if method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method not in OWN_METHODS:
        state = _integrate_by_library(velocity, noise, grid.to(noise.device), method, atol, rtol)
        if on_step is not None:
            on_step(len(grid) - 1, grid[-1], state)
        return state

    def field(time: float, x: Tensor) -> Tensor:
        t = torch.full((len(x),), time, dtype=grid.dtype, device=x.device)
        return _at(velocity, time)(x, t).to(x.dtype)

    times, lengths = grid.tolist(), grid.diff().tolist()
    state = noise
    for step, (now, then, length) in enumerate(zip(times, times[1:], lengths, strict=False)):
        slope = field(now, state)
        ahead = state + length * slope
        if method == "heun":
            ahead = state + (length * 0.5) * (slope + field(then, ahead))
        state = ahead
        if on_step is not None:
            on_step(step + 1, grid[step + 1], state)
    return state


def _at(velocity: Velocity, time: float) -> Velocity:
    return velocity.at(time) if isinstance(velocity, TimedVelocity) else velocity


def _integrate_by_library(
    velocity: Velocity,
    noise: Tensor,
    grid: Tensor,
    method: str,
    atol: float,
    rtol: float,
) -> Tensor:
    from torchdiffeq import odeint

    def field(t: Tensor, x: Tensor) -> Tensor:
        shared = velocity.at(t.item()) if isinstance(velocity, TimedVelocity) else velocity
        return shared(x, t.expand(len(x))).to(x.dtype)

    # Only the ends are asked for, so that the states between are not all kept.
    options = {"grid_constructor": lambda *_: grid} if method in FIXED_METHODS else {}
    states: Tensor = odeint(field, noise, grid[[0, -1]], method=method, atol=atol, rtol=rtol, options=options)
    return states[-1]
