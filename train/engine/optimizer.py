"""Optimizers by name, and their state as named tensors.

The training loop asks three things of an optimizer: that it steps every parameter that is trained; that `step` changes
nothing where its attribute `found_inf`, a float32 tensor on the device, is 1; and that its state is tensors by
parameter, either of the parameter's shape or the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from train.distributed import assign
from train.engine.muon import Muon
from train.settings.config import OptimizerName, OptimizerSettings


def adamw(model: nn.Module, settings: OptimizerSettings) -> AdamW:
    """Return AdamW over the parameters that are trained; its fused kernel reads `found_inf` as torch.amp sets it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if settings.decay_matrices_only:
        groups = [
            {"params": [p for p in trained if p.ndim == 2]},
            {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
        ]
    return AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def muon(model: nn.Module, settings: OptimizerSettings) -> Muon:
    """Return Muon over the matrices that are trained, AdamW over everything else."""
    return Muon(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
        safety=settings.safety,
        safety_on_last=settings.safety_on_last,
        decay_matrices_only=settings.decay_matrices_only,
        half=settings.half,
    )


OPTIMIZERS: dict[OptimizerName, Callable[[nn.Module, OptimizerSettings], Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}
"""Makes an optimizer of a model's trained parameters, by the name that `--optimizer.kind` takes."""


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Return the optimizer that the settings name, over the parameters that are trained."""
    return OPTIMIZERS[settings.kind](model, settings)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as "kind/parameter", such as "exp_avg/pos_embed" (the live tensors, not copies)."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, or copies of it; none of the tensors given is kept."""
    parameters = dict(model.named_parameters())
    for key in stored:
        kind, _, name = key.partition("/")
        # No variable holds the tensor that was read, so that it is freed before the next one is read.
        optimizer.state[parameters[name]][kind] = _beside(parameters[name], stored[key])


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a whole tensor on the parameter's device, sharded as the parameter is if it has its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    copy = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    assign(copy, value)
    return copy
