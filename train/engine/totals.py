"""What steps measure, from the device to a line of metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The samples of one micro-batch of this process, kept until it is known whether the step was sound."""

    rows: NDArray[np.int64]
    """[b] rows of the store."""
    positions: Tensor
    """int64 [b]: places in the stream."""
    losses: Tensor
    """float32 [b]: losses, without gradient."""


class StepTotals:
    """What one step measured over all processes, on its way to the host.

    The copy is started at once and read later, so that the step after it is under way before anyone waits.
    """

    def __init__(
        self, step: int, stop: Tensor, bad: Tensor, norm: Tensor, totals: Tensor, seen: list[Seen]
    ) -> None:
        """Start the copy.

        Args:
            step: the step, counted from 0.
            stop: float32 []: above 0 if any process was told to stop.
            bad: float32 []: 1 if the loss or the gradient was not finite, and the update was skipped.
            norm: float32 []: norm of the gradient before clipping.
            totals: float32 [1 + K, 2]: sums and weights of the loss and of each metric.
            seen: this process's samples.
        """
        self.step, self.seen = step, seen
        on_device = torch.cat([torch.stack([stop, bad, norm]), totals.flatten()])
        self._host = on_device.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if on_device.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def read(self) -> tuple[bool, bool, float, list[list[float]]]:
        """Whether to stop, whether the step was bad, the gradient's norm, and [sum, weight] of each metric."""
        if self._copied is not None:
            self._copied.synchronize()
        stop, bad, norm, *rest = self._host.tolist()
        return stop > 0, bad > 0, norm, [rest[i : i + 2] for i in range(0, len(rest), 2)]

    def suspects(self) -> tuple[list[int], Tensor]:
        """Rows and positions of this process's samples with a non-finite loss, or of all where none has one."""
        rows = np.concatenate([seen.rows for seen in self.seen])
        positions = torch.cat([seen.positions for seen in self.seen])
        broken = ~torch.isfinite(torch.cat([seen.losses for seen in self.seen]))
        if not broken.any():
            return rows.tolist(), positions
        return rows[broken.cpu().numpy()].tolist(), positions[broken]


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
        self._sums = [[0.0, 0.0] for _ in self.names]
        self._norm, self._steps = 0.0, 0

    def add(self, norm: float, totals: list[list[float]]) -> None:
        """Add a sound step."""
        for held, (total, weight) in zip(self._sums, totals, strict=True):
            held[0] += total
            held[1] += weight
        self._norm += norm
        self._steps += 1

    def tick(self) -> None:
        """Count a step for the rate, sound or not."""
        self._timed_steps += 1

    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the window; one that no sample belonged to is left out, the loss is None."""
        means: dict[str, float | None] = {"loss": None}
        means.update((name, s / w) for name, (s, w) in zip(self.names, self._sums, strict=True) if w > 0)
        if self._steps:
            means["gradient_norm"] = self._norm / self._steps
        return means

    def rates(self, waited: float, global_batch_size: int) -> dict[str, float]:
        """Images a second, seconds a step and the share of time spent waiting for data, since `start`."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self._timed_steps, 1)
        return {
            "images_per_second": self._timed_steps * global_batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": (waited - self._waited) / seconds,
        }

    def state(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return {"names": list(self.names), "sums": self._sums, "norm": self._norm, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned, unless the metrics have changed since."""
        if state["names"] == list(self.names):
            self._sums = [list(pair) for pair in state["sums"]]
            self._norm, self._steps = state["norm"], state["steps"]
