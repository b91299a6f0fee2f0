"""The update of a step: clip the gradient, step the optimizer, move the averages; nothing where a number is not finite.

There are two ways. In separate passes the gradient is read for its norm, read and written to be clipped, read with
weights and moments by the optimizer, and the weights are read once more for each average: with one average 52 bytes of
memory traffic a parameter. In one pass, after the norm, each parameter's gradient, weight, moments and averages
are read once and what changes is written once: 40 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.distributed import full_tensor, local_part
from train.engine.ema import WeightAverages
from train.models.compilation import compile_function

NORM_EPS = 1e-6
"""Added to the gradient's norm before it divides the largest allowed one. Source: torch.nn.utils.clip_grad_norm_."""


class SeparatePasses:
    """PyTorch's own functions, one after another; for every optimizer."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, averages: WeightAverages, clip_norm: float | None
    ) -> None:
        """Prepare.

        Args:
            model: the network.
            optimizer: over what is trained of it; `step` changes nothing where the attribute `found_inf` is 1.
            averages: of its parameters.
            clip_norm: largest norm of the gradient; None: any.
        """
        self._optimizer, self._averages = optimizer, averages
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._clip_norm = math.inf if clip_norm is None else clip_norm

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update weights, moments and averages from the gradients.

        Args:
            loss: float32 []: the global batch's summed loss.

        Returns:
            The gradient's norm before clipping, and 1 if weights and moments were left as they are, else 0; float32 []
            each, on the device.
        """
        norm = full_tensor(nn.utils.clip_grad_norm_(self._trained, self._clip_norm))
        bad = not_finite(norm, loss)
        # How torch.amp.GradScaler, too, tells an optimizer to skip an update.
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self._averages.update()
        return norm, bad


class OnePass(SeparatePasses):
    """AdamW, the clip factor and the averages in one compiled pass, a program for each kind of block.

    The optimizer keeps its state, so a checkpoint of one way is continued in the other. Weights differ from those of
    separate passes by rounding: the same formulas, fused by the compiler instead of by PyTorch's kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        averages: WeightAverages,
        clip_norm: float | None,
        *,
        compiled: bool = True,
    ) -> None:
        """Prepare; the arguments are those of `SeparatePasses`.

        Args:
            model: the network.
            optimizer: an AdamW.
            averages: of its parameters.
            clip_norm: largest norm of the gradient; None: any.
            compiled: compile the pass; otherwise it is the same arithmetic in many passes, for tests.
        """
        super().__init__(model, optimizer, averages, clip_norm)
        self._program = compile_function(advance) if compiled else advance
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._blocks = list(blocks_of(model))
        self._decay = {
            parameter: group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update weights, moments and averages from the gradients; see `SeparatePasses`."""
        blocks = [[p for p in block if p.grad is not None] for block in self._blocks]
        stepped = [parameter for block in blocks for parameter in block]
        norm = full_tensor(nn.utils.get_total_norm([_gradient(parameter) for parameter in stepped]))
        bad = not_finite(norm, loss)
        clip = torch.clamp(self._clip_norm / (norm + NORM_EPS), max=1.0)
        numbers = torch.split(self._numbers(stepped, clip, bad), [len(block) for block in blocks])
        group, rates = self._optimizer.param_groups[0], self._averages.rates
        averages = [self._averages.weights(rate) for rate in rates]
        for block, numbers_of_block in zip(blocks, numbers, strict=True):
            states = [self._optimizer.state[parameter] for parameter in block]
            self._program(
                [local_part(parameter.detach()) for parameter in block],
                [local_part(_gradient(parameter)) for parameter in block],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [[local_part(named[self._names[parameter]]) for parameter in block] for named in averages],
                numbers_of_block,
                bad,
                betas=group["betas"],
                eps=group["eps"],
                moves=tuple(1.0 - rate for rate in rates),
            )
        self._averages.update(except_for={self._names[parameter] for parameter in stepped})
        return norm, bad

    def _numbers(self, parameters: list[nn.Parameter], clip: Tensor, bad: Tensor) -> Tensor:
        """Count the step, and give what `advance` needs of each parameter besides tensors of its shape.

        Each has a count of its own, on the device: which steps were skipped the host does not know, and does not ask.
        """
        group = self._optimizer.param_groups[0]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        counts = [self._state(parameter)["step"] for parameter in parameters]
        torch._foreach_add_(counts, 1 - bad)
        steps = torch.stack(counts).double()
        # Filled on the device: a tensor made of Python numbers is copied there, and the host waits for the copy.
        shrinkage = {decay: bad.new_full((), lr * decay) for decay in set(self._decay.values())}
        columns = (
            lr / (1 - beta1**steps),
            (1 - beta2**steps).sqrt(),
            torch.stack([shrinkage[self._decay[parameter]] for parameter in parameters]),
            clip.expand(len(parameters)),
        )
        return torch.stack([column.float() for column in columns], dim=1)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state, made as AdamW makes it where there is none."""
        state: dict[str, Tensor] = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def advance(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    averages: list[list[Tensor]],
    numbers: Tensor,
    bad: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    moves: tuple[float, ...],
) -> None:
    """Take one step of AdamW on clipped gradients and, from its result, of the averages; in place.

    Source: arXiv 1711.05101 algorithm 2, with the terms as torch.optim.AdamW's fused kernel has them.

    Args:
        weights: P parameters, float32.
        gradients: theirs, which stay as they are.
        means: AdamW's first moments.
        squares: AdamW's second moments.
        averages: for each rate the averages of the P parameters.
        numbers: float32 [P, 4]: learning rate / (1 - beta1^t), sqrt(1 - beta2^t), learning rate * weight decay, and
            the factor that clips the gradient.
        bad: float32 []: 1 if weights and moments are to stay as they are.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        moves: for each rate how far an average goes towards its weight, 1 - rate.
    """
    beta1, beta2 = betas
    skipped = bad > 0
    for index, (weight, mean, square) in enumerate(zip(weights, means, squares, strict=True)):
        size, root, shrink, clip = numbers[index].unbind()
        gradient = gradients[index] * clip
        new_mean = torch.lerp(mean, gradient, 1 - beta1)
        new_square = beta2 * square + (1 - beta2) * (gradient * gradient)
        kept = weight - shrink * weight
        moved = torch.where(skipped, weight, kept - size * new_mean / (new_square.sqrt() / root + eps))
        mean.copy_(torch.where(skipped, mean, new_mean))
        square.copy_(torch.where(skipped, square, new_square))
        weight.copy_(moved)
        for move, averages_of_rate in zip(moves, averages, strict=True):
            average = averages_of_rate[index]
            average.copy_(torch.lerp(average, moved, move))


def blocks_of(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """List the parameters that are trained by block of the model's module lists, then the others."""
    given: set[nn.Parameter] = set()
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in [block for blocks in lists for block in blocks] + [model]:
        found = [p for p in block.parameters() if p.requires_grad and p not in given]
        given.update(found)
        if found:
            yield found


def not_finite(norm: Tensor, loss: Tensor) -> Tensor:
    """Return 1 where the gradient's norm or the loss is not finite, else 0; float32 [] on the device."""
    return (~(torch.isfinite(norm) & torch.isfinite(loss))).float()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
