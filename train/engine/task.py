"""A task: the network that is trained, and its loss. The training loop knows neither."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.engine.checkpoint import Parts
from train.engine.feed import MicroBatch
from train.models.config import ModelConfig


@dataclass(frozen=True)
class Losses:
    """What a task computes of a micro-batch of b samples."""

    per_sample: Tensor
    """float32 [b]: the loss of each sample."""
    metrics: Mapping[str, Tensor]
    """By name, float32 [2] on the device, without gradient: sum and weight of a metric over the samples; a metric of
    the task that is left out has no weight here."""
    logged: Tensor | None = None
    """float32 [b], without gradient: what is logged as the loss where `per_sample` says nothing; None: that."""


Autocast = Callable[[], AbstractContextManager[object]]
"""Enters the arithmetic the network is computed in."""


class Task(ABC):
    """A network and its loss."""

    metric_names: ClassVar[tuple[str, ...]] = ()
    """Names of all metrics that `losses` and `after_update` may return, in the order they are logged."""
    fields: tuple[str, ...] = ("tokens",)
    """Fields of the store that a micro-batch must hold."""
    needs_whole_step: ClassVar[bool] = False
    """Whether `before_step` and `after_update` are called, for which all micro-batches of a step are kept."""
    facts: Mapping[str, str] = MappingProxyType({})
    """Identities of what else is learnt from, by the setting that names it; a run is continued with the same alone."""
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
        """Return the losses of a micro-batch; `model` is the network as it is called in training."""

    @abstractmethod
    def describe(self, positions: Tensor) -> str:
        """Return random numbers of samples whose loss is not finite, for the log."""

    @abstractmethod
    def save_snapshot(
        self, path: Path, weights: dict[str, Tensor], *, step: int, ema_rate: float, write: bool = True
    ) -> None:
        """Write weights to use, whole or sharded; every process must call this, and the one with `write` writes."""

    @abstractmethod
    def render_samples(self, path: Path) -> None:
        """Write a sheet of what the network, as it is now, generates or reconstructs."""

    def evaluate(self) -> dict[str, float]:
        """Scores of the network, as it is now, on other than its training samples; every process must call this."""
        return {}

    def backward(self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast) -> Losses:
        """Add the gradients of `scale` times the summed loss of a micro-batch."""
        with autocast():
            losses = self.losses(model, batch)
        (losses.per_sample.sum() * scale).backward()  # type: ignore[no-untyped-call]  # torch's own
        return losses

    def before_step(  # noqa: B027 - most tasks prepare nothing
        self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast
    ) -> None:
        """Prepare a step from all its micro-batches, before any gradient; called if the task `needs_whole_step`."""

    def after_update(
        self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast
    ) -> Mapping[str, Tensor]:
        """Train further networks, after the update of `model`; called if the task `needs_whole_step`.

        Returns:
            Metrics of this process's samples, as in `Losses.metrics`; none, or the same names on every process.
        """
        return {}

    def extra_state(self) -> Parts:
        """Return the whole tensors, besides network and optimizer, that a checkpoint must hold; by part and name."""
        return {}

    def load_extra_state(self, parts: Parts) -> None:  # noqa: B027 - most tasks have none
        """Put back what `extra_state` returned."""


def sum_and_count(values: Tensor) -> Tensor:
    """Return the sum of values [b] and their number, float32 [2]; the host does not wait for the device."""
    return torch.stack([values.sum(), values.new_full((), len(values))])
