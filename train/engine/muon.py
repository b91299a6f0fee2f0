"""Muon for matrices and AdamW for everything else, as one optimizer.

Of a matrix's gradient g, with momentum M ← μ M + g, Muon takes U = g + μ M, replaces its singular values by numbers
near 1 (`orthogonalize`) and subtracts lr · 0.2 · √max(rows, columns) times that, an update of AdamW's typical size.

Source: github:KellerJordan/Muon (the optimizer); arXiv 2502.16982 section 2.2 (the factor 0.2 · √max); arXiv 2505.16932
(Polar Express, the polynomials); which parameters RAEv2 gives to Muon: src/utils/optim_utils.py in
github:nanovisionx/RAEv2 at 8a0d238; order of the float16 arithmetic: github:Dao-AILab/gram-newton-schulz at 775c9c7.
torch.optim.Muon takes one polynomial for all iterations and is another optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from train.distributed import local_part

Polynomial = tuple[float, float, float]
"""a, b, c of a·x + b·x³ + c·x⁵, which is applied to the singular values."""

POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""The polynomials of the iterations, best in turn for singular values from 0.001 to 1. Source: arXiv 2505.16932."""

NORM_EPS = 1e-7
"""Added to the Frobenius norm. Source: github:Dao-AILab/gram-newton-schulz."""

UPDATE_FACTOR = 0.2
"""Root mean square of AdamW's typical update. Source: arXiv 2502.16982 section 2.2."""

BEFORE_RESTART = 2
"""Iterations after which a Gram matrix is computed again. Source: as `orthogonalize_by_gram`."""

LARGEST_BATCH = 1 << 26
"""Most numbers of matrices that are orthogonalized at once; 128 MiB in float16, a few times that while it computes."""


def polynomials(safety: float, *, safety_on_last: bool) -> tuple[Polynomial, ...]:
    """Polar Express's polynomials, of x / safety instead of x, so that rounding cannot push x beyond their range.

    Args:
        safety: what x is divided by, a little above 1.
        safety_on_last: whether the last polynomial is changed too. github:Dao-AILab/gram-newton-schulz had 1.01 and
            1.02 without the last, and has 1.05 with it; which of them trained RAEv2 is not public.
    """
    changed = len(POLAR_EXPRESS) if safety_on_last else len(POLAR_EXPRESS) - 1
    return (
        *((a / safety, b / safety**3, c / safety**5) for a, b, c in POLAR_EXPRESS[:changed]),
        *POLAR_EXPRESS[changed:],
    )


def orthogonalize(matrices: Tensor, steps: tuple[Polynomial, ...], dtype: torch.dtype) -> Tensor:
    """Move the singular values of matrices close to 1 and keep their singular vectors.

    Every operation is a product of matrices with its addition; there is nothing left for a compiler to fuse.

    Args:
        matrices: float [k, rows, columns].
        steps: the polynomial of each iteration X ← a X + (b A + c A²) X, with A = X Xᵀ.
        dtype: what the products are computed in.

    Returns:
        [k, rows, columns] in `dtype`.
    """
    x = _wide(matrices, dtype)
    for a, b, c in steps:
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x.mT if _is_tall(matrices) else x


def orthogonalize_by_gram(matrices: Tensor, steps: tuple[Polynomial, ...], dtype: torch.dtype) -> Tensor:
    """As `orthogonalize`, with most products among small square matrices where a matrix is not square.

    Each iteration multiplies X from the left by a polynomial of A = X Xᵀ, so that several of them are one matrix Q, a
    product of such polynomials, and X is multiplied by it once. A is computed from X again after two iterations: its
    rounding would grow too far. In float32 the plain form is more exact, for matrices of low rank by a factor of 20.

    Source: github:Dao-AILab/gram-newton-schulz at 775c9c7; the results in float16 are the same to the last bit.
    """
    if matrices.shape[1] == matrices.shape[2]:
        return orthogonalize(matrices, steps, dtype)
    x = _wide(matrices, dtype)
    for part in (steps[:BEFORE_RESTART], steps[BEFORE_RESTART:]):
        x = _product_of_polynomials(x @ x.mT, part) @ x
    return x.mT if _is_tall(matrices) else x


def _product_of_polynomials(gram: Tensor, steps: tuple[Polynomial, ...]) -> Tensor:
    """Q of X ← Q X for these iterations, from A = X Xᵀ [k, rows, rows]."""
    product = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for number, (a, b, c) in enumerate(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor + a * product if number == 0 else torch.baddbmm(product, product, factor, beta=a)
        if number < len(steps) - 1:  # A of the next X: (a + factor) A (a + factor)
            half = torch.baddbmm(gram, gram, factor, beta=a)
            gram = torch.baddbmm(half, factor, half, beta=a)
    return product


def _is_tall(matrices: Tensor) -> bool:
    return matrices.shape[1] > matrices.shape[2]


def _wide(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Divided by their Frobenius norms, with no more rows than columns."""
    x = matrices.mT if _is_tall(matrices) else matrices
    norm: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return (x / (norm + NORM_EPS)).to(dtype)


class Muon(Optimizer):
    """Muon for parameters with two dimensions, fused AdamW for the others.

    Each process orthogonalizes its share of the matrices, whether they are whole in each (DDP) or sharded by rows
    (FSDP2), and tells the others the result; so they also agree to the last bit.

    Where the attribute `found_inf`, float32 [] on the device, is 1, a step changes nothing, and the host is not asked.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        safety: float = 1.05,
        safety_on_last: bool = True,
        decay_matrices_only: bool = False,
        half: bool | None = None,
    ) -> None:
        """Build over parameters that are trained.

        Args:
            parameters: what is trained.
            lr: learning rate of both.
            momentum: Muon's μ.
            weight_decay: decoupled; each step multiplies by 1 − lr · weight_decay.
            betas: AdamW's.
            eps: AdamW's.
            safety: see `polynomials`.
            safety_on_last: see `polynomials`.
            decay_matrices_only: weight decay is Muon's alone.
            half: orthogonalize in float16 by `orthogonalize_by_gram`, with directions and updates rounded to bfloat16,
                bit for bit as github:Dao-AILab/gram-newton-schulz at 775c9c7; singular vectors that a gradient of low
                rank does not have are then rounding's, at full size. Otherwise float32. None: half on CUDA only.
        """
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._steps = polynomials(safety, safety_on_last=safety_on_last)
        self._half = half
        self._adamw: AdamW | None = None
        if others:
            decay = 0.0 if decay_matrices_only else weight_decay
            self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
            # One optimizer to whoever sets a learning rate or saves the state.
            self.param_groups += self._adamw.param_groups
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        if self._adamw is not None:
            if self.found_inf is not None:
                self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        group = self.param_groups[0]
        trained = [p for p in group["params"] if p.grad is not None]
        skipped = None if self.found_inf is None else self.found_inf.bool()
        for matrices in _alike(trained):
            directions = self._directions(matrices, group["momentum"], skipped)
            sharing = _sharing(matrices[0])
            for start, update in self._orthogonalized(directions, sharing):
                self._apply(matrices[start : start + len(update)], update, group, skipped)

    def _directions(self, matrices: list[Tensor], momentum: float, skipped: Tensor | None) -> list[Tensor]:
        """Nesterov's look ahead, g + μ M, after M ← μ M + g; this process's rows."""
        gradients = [local_part(cast("Tensor", p.grad)) for p in matrices]
        buffers = []
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffers.append(local_part(self.state[p]["momentum"]))
        decay: float | Tensor = momentum
        if skipped is not None:
            decay = torch.where(skipped, 1.0, momentum).to(buffers[0].dtype)
            for gradient in gradients:
                gradient.masked_fill_(skipped, 0)
        torch._foreach_mul_(buffers, decay)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))

    def _orthogonalized(self, directions: list[Tensor], sharing: _Sharing) -> Iterator[tuple[int, Tensor]]:
        """Yield orthogonalized directions, some at a time: number of the first, and this process's rows of each."""
        half = directions[0].is_cuda if self._half is None else self._half
        most = max(1, LARGEST_BATCH // max(1, sharing.numbers)) * sharing.world_size
        for start in range(0, len(directions), most):
            mine = sharing.collect(directions[start : start + most])
            if half:
                mine = mine.bfloat16().float()
                found = orthogonalize_by_gram(mine, self._steps, torch.float16).bfloat16()
            else:
                found = orthogonalize(mine, self._steps, torch.float32)
            yield start, sharing.spread(found)[: len(directions) - start]

    def _apply(
        self, matrices: list[Tensor], update: Tensor, group: dict[str, Any], skipped: Tensor | None
    ) -> None:
        rows, columns = matrices[0].shape
        size = group["lr"] * UPDATE_FACTOR * max(rows, columns) ** 0.5
        decay: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if skipped is not None:
            update = update.masked_fill(skipped, 0)
            decay = torch.where(skipped, 1.0, decay)
        locals_ = [local_part(p) for p in matrices]
        if group["weight_decay"]:
            torch._foreach_mul_(locals_, decay)
        changes = (update * size).unbind()
        torch._foreach_sub_(locals_, [change.to(p.dtype) for change, p in zip(changes, locals_, strict=True)])


class _Sharing:
    """Who orthogonalizes which matrices of one shape: all by the one process there is."""

    world_size = 1

    def __init__(self, parameter: Tensor) -> None:
        self.numbers = parameter.numel()

    def collect(self, directions: list[Tensor]) -> Tensor:
        """Exchange this process's rows of matrices for the whole matrices it computes, [k, rows, columns]."""
        return torch.stack(directions)

    def spread(self, computed: Tensor) -> Tensor:
        """Exchange computed matrices for this process's rows of all matrices, padding included."""
        return computed


class _WholeMatrices(_Sharing):
    """Every process holds every matrix: process r computes numbers r · k to (r + 1) · k."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter)
        self.world_size, self._rank = dist.get_world_size(), dist.get_rank()

    def collect(self, directions: list[Tensor]) -> Tensor:
        """See `_Sharing.collect`."""
        each = -(-len(directions) // self.world_size)
        mine = directions[self._rank * each : (self._rank + 1) * each]
        mine += [torch.zeros_like(directions[0])] * (each - len(mine))
        return torch.stack(mine)

    def spread(self, computed: Tensor) -> Tensor:
        """See `_Sharing.spread`."""
        gathered = computed.new_empty(self.world_size * len(computed), *computed.shape[1:])
        dist.all_gather_into_tensor(gathered, computed.contiguous())
        return gathered


class _ShardedRows(_Sharing):
    """Every process holds some rows of every matrix (FSDP2): they are brought together, and taken apart again."""

    def __init__(self, parameter: DTensor) -> None:
        super().__init__(parameter)
        self._group = parameter.device_mesh.get_group()
        self.world_size = dist.get_world_size(self._group)
        self._rows, self._columns = parameter.shape
        self._most_rows = -(-self._rows // self.world_size)
        self._own_rows = parameter.to_local().shape[0]

    def collect(self, directions: list[Tensor]) -> Tensor:
        """See `_Sharing.collect`."""
        each = -(-len(directions) // self.world_size)
        sent = directions[0].new_zeros(each * self.world_size, self._most_rows, self._columns)
        for place, rows in zip(sent, directions, strict=False):
            place[: self._own_rows] = rows
        # [process, matrix, rows, columns]: rows of matrices that process computes, then rows that process holds.
        parts = self._exchange(sent).view(self.world_size, each, self._most_rows, self._columns)
        return parts.transpose(0, 1).flatten(1, 2)[:, : self._rows]

    def spread(self, computed: Tensor) -> Tensor:
        """See `_Sharing.spread`."""
        padding = self.world_size * self._most_rows - self._rows
        padded = torch.nn.functional.pad(computed, (0, 0, 0, padding))
        parts = padded.view(-1, self.world_size, self._most_rows, self._columns).transpose(0, 1)
        return self._exchange(parts.flatten(0, 1))[:, : self._own_rows]

    def _exchange(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent.contiguous(), group=self._group)
        return received


def _sharing(parameter: Tensor) -> _Sharing:
    if isinstance(parameter, DTensor):
        return _ShardedRows(parameter)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _WholeMatrices(parameter)
    return _Sharing(parameter)


def _alike(matrices: list[Tensor]) -> list[list[Tensor]]:
    """Return matrices by shape, in order; the same on every process."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.shape, []).append(matrix)
    return list(groups.values())
