"""What the loop does not know: which network is trained, and by what loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.checkpoint import Parts
from train.engine.feed import MicroBatch
from train.models.config import ModelConfig


@dataclass(frozen=True)
class Losses:
    """What a task makes of a micro-batch of b samples."""

    per_sample: Tensor
    """float32 [b]: the loss of each sample."""
    metrics: Tensor
    """float32 [K, 2], without gradient: sum and weight of each of the task's metrics over the samples."""


Autocast = Callable[[], AbstractContextManager[object]]
"""Enters the arithmetic the network is computed in."""


class Task(ABC):
    """A network and its loss."""

    metric_names: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics `losses` measures, in order."""
    looks_twice: ClassVar[bool] = False
    """Whether a step's micro-batches are needed together, before and after the update."""
    evaluate_every: int | None = None
    """Steps between two calls of `evaluate`; None: it is never called."""
    model: nn.Module
    """The network, on the device."""

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """The network's configuration."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Losses of a micro-batch; `model` is the network as it is called in training."""

    @abstractmethod
    def describe(self, positions: Tensor) -> str:
        """What was drawn for samples whose loss is not finite, for the report."""

    @abstractmethod
    def save_snapshot(
        self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float, write: bool = True
    ) -> None:
        """Write weights to use, whole or sharded; every process must ask, and the one told to writes."""

    @abstractmethod
    def draw_samples(self, path: Path) -> None:
        """Draw a picture of what the network, as it is now, has learnt."""

    def evaluate(self) -> dict[str, float]:
        """How well the network, as it is now, does beyond its training samples; every process must ask."""
        return {}

    def backward(self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast) -> Losses:
        """Add the gradients of `scale` times the summed loss of a micro-batch."""
        with autocast():
            losses = self.losses(model, batch)
        (losses.per_sample.sum() * scale).backward()  # type: ignore[no-untyped-call]  # torch's own
        return losses

    def before_step(  # noqa: B027 - most tasks have nothing to look at
        self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast
    ) -> None:
        """Look at all of a step's micro-batches before any gradient; called if the task `looks_twice`."""

    def after_update(self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast) -> Tensor | None:
        """Train what stands beside the network, after its update; called if the task `looks_twice`.

        Returns:
            Sums and weights [K, 2] over all processes to add to the step's metrics, or None.
        """
        return None

    def further_state(self) -> Parts:
        """Whole tensors, other than the network's, that a checkpoint must hold; by part and name."""
        return {}

    def load_further_state(self, parts: Parts) -> None:  # noqa: B027 - most tasks have no further state
        """Put back what `further_state` returned."""


def sum_and_count(values: Tensor) -> Tensor:
    """Sum of values [b] and their number, float32 [2]; the host does not wait for the device."""
    return torch.stack([values.sum(), values.new_full((), len(values))])
