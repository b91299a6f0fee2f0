"""A run's tensors as named, whole tensors, and back: weights, averages and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from train.distributed import assign
from train.engine.checkpoint import Parts
from train.engine.ema import WeightAverages
from train.settings.config import OptimizerSettings

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> AdamW:
    """Fused AdamW over the parameters that are trained.

    The fused kernel also skips an update on the device when told that a gradient is not finite.
    """
    return AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def state_parts(model: nn.Module, averages: WeightAverages, optimizer: Optimizer) -> Parts:
    """Everything that changes in training (the live tensors, which may be sharded, not copies).

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
    """
    with opened("model") as stored:
        _assign_all(model.state_dict(), stored)
    for rate in averages.rates:
        with opened(_average_part(rate)) as stored:
            _assign_all(averages.weights(rate), stored)
    with opened("optimizer") as stored:
        restore_optimizer(model, optimizer, stored)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by moment and parameter name (the live tensors, not copies)."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, or copies of it; none of the tensors given is kept."""
    for name, parameter in model.named_parameters():
        if f"exp_avg/{name}" not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = moments[f"step/{name}"].to(parameter.device, torch.float32, copy=True)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            assign(state[moment], moments[f"{moment}/{name}"])


def _assign_all(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name, tensor in targets.items():
        assign(tensor, stored[name])


def _average_part(rate: float) -> str:
    return f"ema-{rate:g}"
