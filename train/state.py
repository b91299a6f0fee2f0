"""A run's tensors as named, whole tensors, and back: weights, averages and the optimizer's moments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from train.checkpoint import Parts
from train.config import OptimizerSettings
from train.distributed import assign, full_tensor
from train.ema import WeightAverages

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


def gather_parts(model: nn.Module, averages: WeightAverages, optimizer: Optimizer, *, keep: bool) -> Parts:
    """Copies in host memory of everything that changes in training; every process must call this.

    Args:
        model: the network (not a wrapper around it).
        averages: its running averages.
        optimizer: its optimizer.
        keep: whether this process wants the result; others only help to gather and get empty parts.
    """
    named: dict[str, dict[str, Tensor]] = {
        "model": model.state_dict(),
        "optimizer": optimizer_tensors(model, optimizer),
    }
    for rate in averages.rates:
        named[_average_part(rate)] = averages.weights(rate)
    return {part: host_copies(tensors, keep=keep) for part, tensors in named.items()}


def host_copies(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory, gathered one at a time; an empty dictionary where `keep` is false."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if keep:
            copies[name] = whole.to("cpu", copy=True)
    return copies


def restore_parts(parts: Parts, model: nn.Module, averages: WeightAverages, optimizer: Optimizer) -> None:
    """Put back what `gather_parts` returned."""
    for name, tensor in model.state_dict().items():
        assign(tensor, parts["model"][name])
    for rate in averages.rates:
        for name, tensor in averages.weights(rate).items():
            assign(tensor, parts[_average_part(rate)][name])
    restore_optimizer(model, optimizer, parts["optimizer"])


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by moment and parameter name (the live tensors, not copies)."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, moments: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, or copies of it."""
    for name, parameter in model.named_parameters():
        if f"exp_avg/{name}" not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = moments[f"step/{name}"].to(parameter.device, torch.float32)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            assign(state[moment], moments[f"{moment}/{name}"])


def part_names(averages: WeightAverages) -> tuple[str, ...]:
    """The parts `gather_parts` returns."""
    return ("model", "optimizer", *map(_average_part, averages.rates))


def _average_part(rate: float) -> str:
    return f"ema-{rate:g}"
