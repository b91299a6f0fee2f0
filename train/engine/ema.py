"""Exponential moving averages of weights, several rates at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverages:
    """One running average of a model's parameters for each rate, starting from the parameters themselves.

    After each optimizer step every average moves to rate · average + (1 − rate) · parameter; there is no
    warm-up and no bias correction. Buffers are constants of the architecture and are not averaged.

    The averages hold the parameters' own tensors, never a copy of the module, so what is evaluated through
    `applied` is the average also when the module is compiled.

    Source: github:bytetriper/RAE src/utils/train_utils.py update_ema at a4d18c4.
    """

    def __init__(self, model: nn.Module, rates: tuple[float, ...]) -> None:
        self.rates = rates
        self.names = [name for name, _ in model.named_parameters()]
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self._averages = {rate: [p.clone() for p in self._parameters] for rate in rates}

    @torch.no_grad()
    def update(self, *, except_for: Collection[str] = ()) -> None:
        """Move averages by one optimizer step, in a few fused kernels a rate.

        Args:
            except_for: names of parameters whose averages have been moved already.
        """
        chosen = [index for index, name in enumerate(self.names) if name not in except_for]
        if not chosen:
            return
        parameters = [self._parameters[index] for index in chosen]
        for rate, averages in self._averages.items():
            torch._foreach_lerp_([averages[index] for index in chosen], parameters, 1.0 - rate)

    def weights(self, rate: float) -> dict[str, Tensor]:
        """Return the average of one rate by parameter name (the live tensors, not a copy)."""
        return dict(zip(self.names, self._averages[rate], strict=True))

    @contextmanager
    def applied(self, rate: float) -> Iterator[None]:
        """Within this context the model's parameters are the averages of `rate`.

        The values are exchanged in place, so compiled code, hooks and sharded wrappers see them too.
        """
        self._exchange(rate)
        try:
            yield
        finally:
            self._exchange(rate)

    @torch.no_grad()
    def _exchange(self, rate: float) -> None:
        for average, parameter in zip(self._averages[rate], self._parameters, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
