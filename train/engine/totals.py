"""What steps measure, from the device to a line of metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatchLosses:
    """The losses of one micro-batch of this process, kept until it is known whether they are finite."""

    rows: NDArray[np.int64]
    """[b] rows of the store."""
    positions: Tensor
    """int64 [b]: positions in the stream of samples."""
    losses: Tensor
    """float32 [b]: losses, without gradient."""


def stack_metrics(names: Sequence[str], metrics: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Return metrics in the order of `names`, float32 [K, 2]: sum and weight, both 0 where a metric is left out.

    Args:
        names: all metrics.
        metrics: some of them by name, float32 [2] each, on the device.
        like: a tensor on that device.
    """
    assert metrics.keys() <= set(names), (
        f"metrics {sorted(metrics.keys() - set(names))} are not in the task's metric_names"
    )
    absent = like.new_zeros(2)
    return torch.stack([metrics.get(name, absent) for name in names])


class StepResult(NamedTuple):
    """What one step measured over all processes."""

    stop: bool
    """Whether any process was told to stop."""
    skipped: bool
    """Whether the loss or the gradient was not finite, so that the step changed nothing."""
    gradient_norm: float
    """Norm of the gradient before clipping."""
    metrics: dict[str, tuple[float, float]]
    """Sum and weight of each metric, the loss among them, by name."""


class StepTotals:
    """What one step measured over all processes, on its way to the host.

    The copy is started at once and read later, so that the step after it is under way before anyone waits.
    """

    def __init__(
        self,
        step: int,
        *,
        stop: Tensor,
        bad: Tensor,
        norm: Tensor,
        names: Sequence[str],
        totals: Tensor,
        losses: list[MicroBatchLosses],
    ) -> None:
        """Start the copy.

        Args:
            step: the step, counted from 0.
            stop: float32 []: above 0 if any process was told to stop.
            bad: float32 []: 1 if the loss or the gradient was not finite, and the update was skipped.
            norm: float32 []: norm of the gradient before clipping.
            names: the metrics, the loss among them.
            totals: float32 [K, 2]: their sums and weights.
            losses: losses of this process's samples.
        """
        self.step, self.losses = step, losses
        self._names = names
        on_device = torch.cat([torch.stack([stop, bad, norm]), totals.flatten()])
        self._host = on_device.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if on_device.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def read(self) -> StepResult:
        """Wait until the copy is complete; return the numbers on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        stop, bad, norm, *numbers = self._host.tolist()
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return StepResult(
            stop=stop > 0,
            skipped=bad > 0,
            gradient_norm=norm,
            metrics=dict(zip(self._names, pairs, strict=True)),
        )

    def suspects(self) -> tuple[list[int], Tensor]:
        """Return rows and positions of this process's samples with a non-finite loss, or of all where none has one."""
        rows = np.concatenate([found.rows for found in self.losses])
        positions = torch.cat([found.positions for found in self.losses])
        broken = ~torch.isfinite(torch.cat([found.losses for found in self.losses]))
        if not broken.any():
            return rows.tolist(), positions
        return rows[broken.cpu().numpy()].tolist(), positions[broken]


@dataclass(frozen=True, kw_only=True)
class WindowState:
    """A window as a checkpoint holds it."""

    names: list[str]
    """Names of the metrics."""
    sums: list[tuple[float, float]]
    """Sum and weight of each."""
    norm: float
    """Sum of the gradient's norms."""
    steps: int
    """Steps in the window."""


class Window:
    """Sums over the steps since the last line of metrics; part of a checkpoint, so that no line is lost."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.clear()
        self.start(0.0)

    def start(self, waited: float) -> None:
        """Begin to measure time.

        Args:
            waited: seconds the feed has waited for data so far.
        """
        self._since, self._waited, self._timed_steps = time.perf_counter(), waited, 0

    def clear(self) -> None:
        """Forget the sums."""
        self._sums = {name: [0.0, 0.0] for name in self.names}
        self._norm, self._steps = 0.0, 0

    def add(self, norm: float, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Add a step whose loss and gradient were finite.

        Args:
            norm: norm of the gradient before clipping.
            metrics: sum and weight of every metric by name.
        """
        for name, (total, weight) in metrics.items():
            held = self._sums[name]
            held[0] += total
            held[1] += weight
        self._norm += norm
        self._steps += 1

    def tick(self) -> None:
        """Count a step for the rates, whether or not its loss and gradient were finite."""
        self._timed_steps += 1

    def means(self) -> dict[str, float | None]:
        """Return each metric's mean over the window; one without samples is left out, the loss is then None."""
        means: dict[str, float | None] = {"loss": None}
        means.update((name, total / weight) for name, (total, weight) in self._sums.items() if weight > 0)
        if self._steps:
            means["gradient_norm"] = self._norm / self._steps
        return means

    def rates(self, waited: float, global_batch_size: int) -> dict[str, float]:
        """Return images a second, seconds a step and the share of time spent waiting for data, since `start`."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self._timed_steps, 1)
        return {
            "images_per_second": self._timed_steps * global_batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": (waited - self._waited) / seconds,
        }

    def state(self) -> WindowState:
        """Return the sums, for a checkpoint."""
        sums = [(total, weight) for total, weight in self._sums.values()]
        return WindowState(names=list(self.names), sums=sums, norm=self._norm, steps=self._steps)

    def load(self, state: WindowState) -> None:
        """Put back what `state` returned, unless the metrics have changed since."""
        if state.names == list(self.names) and len(state.sums) == len(state.names):
            self._sums = {name: list(pair) for name, pair in zip(state.names, state.sums, strict=True)}
            self._norm, self._steps = state.norm, state.steps
