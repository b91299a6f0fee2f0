"""A run's tensors as named, whole tensors, and back: weights, averages and the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.optim import Optimizer

from shards import UserError
from train.distributed import assign
from train.engine.checkpoint import Parts
from train.engine.ema import WeightAverages
from train.engine.optimizer import optimizer_tensors, restore_optimizer


def state_parts(model: nn.Module, averages: WeightAverages, optimizer: Optimizer) -> Parts:
    """Return everything that changes in training (the live tensors, which may be sharded, not copies).

    Args:
        model: the network (not a wrapper around it).
        averages: its running averages.
        optimizer: its optimizer.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer_tensors(model, optimizer),
        **{_average_part(rate): averages.weights(rate) for rate in averages.rates},
    }


def restore_parts(
    opened: Callable[[str], AbstractContextManager[Mapping[str, Tensor]]],
    model: nn.Module,
    averages: WeightAverages,
    optimizer: Optimizer,
) -> None:
    """Put back what a checkpoint of `state_parts` holds, so that host memory holds a tensor of it at a time.

    Args:
        opened: opens a part by name, whose tensors are read when they are asked for.
        model: the network (not a wrapper around it).
        averages: its running averages.
        optimizer: its optimizer.

    Raises:
        UserError: a tensor has another shape than the network's.
    """
    with opened("model") as stored:
        _assign_all(model.state_dict(), stored)
    for rate in averages.rates:
        with opened(_average_part(rate)) as stored:
            _assign_all(averages.weights(rate), stored)
    with opened("optimizer") as stored:
        restore_optimizer(model, optimizer, stored)


def _assign_all(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name, tensor in targets.items():
        _assign(
            name, tensor, stored[name]
        )  # no name of its own here, which would hold it while the next is read


def _assign(name: str, target: Tensor, stored: Tensor) -> None:
    if stored.shape != target.shape:
        raise UserError(
            f"a run goes on with a network of the shape it began with: {name} is {tuple(stored.shape)} in the "
            f"checkpoint and {tuple(target.shape)} by settings and store; give those it was begun with, or begin "
            "another run with another --out"
        )
    assign(target, stored)


def _average_part(rate: float) -> str:
    return f"ema-{rate:g}"
