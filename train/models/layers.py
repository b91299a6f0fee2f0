"""The transformer block that DiT and DiT-DH share, and its parts.

Module names are those of the published weights, so that a published state dict loads without a table of
names.

Source: arXiv 2212.09748 section 3.2 (adaLN-Zero), arXiv 2501.01423 section 5 (LightningDiT: SwiGLU,
RMSNorm, rotary encoding); github:bytetriper/RAE src/stage2/models/{lightningDiT,DDT,model_utils}.py at
a4d18c4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.models.config import ModulatedDiTConfig
from train.models.embeddings import RotaryEncoding

NORM_EPS = 1e-6
"""Added to the mean square or the variance before the root. Source: as the module."""

SWIGLU_MULTIPLE = 64
"""On a GPU a SwiGLU's odd width (5461) is padded to a multiple of this, which tensor cores need."""


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Scale and shift: x · (1 + scale) + shift; [B, N, width] with [B, 1 or N, width]."""
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


HeadNorm = Callable[[int], nn.Module]
"""Makes the norm of queries or keys of heads of a width."""


def make_norm(width: int, *, rms: bool, affine: bool = False) -> nn.Module:
    """RMSNorm with weights, or LayerNorm, without a scale and a bias unless it is `affine`."""
    if rms:
        return nn.RMSNorm(width, eps=NORM_EPS)
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=affine)


def scaled_head_norm(head_width: int) -> nn.Module:
    """LayerNorm with a scale and no bias. Source: github:noctrog/flatdino models/transformer.py at cdd398f."""
    return nn.LayerNorm(head_width, eps=NORM_EPS, bias=False)


def plain_head_norm(head_width: int) -> nn.Module:
    """LayerNorm with weights and PyTorch's own eps, unlike the blocks' norms.

    Source: NormAttention in github:bytetriper/RAE src/stage2/models/model_utils.py at a4d18c4.
    """
    return nn.LayerNorm(head_width)


def head_norm_of(config: ModulatedDiTConfig) -> HeadNorm | None:
    """Return how a transformer normalises queries and keys, if it does."""
    if not config.qk_norm:
        return None
    if config.rms_norm:
        return partial(nn.RMSNorm, eps=NORM_EPS)
    return scaled_head_norm if config.norm_affine else plain_head_norm


class Attention(nn.Module):
    """Self-attention with rotary encoding and, as an option, normalised queries and keys."""

    def __init__(self, width: int, num_heads: int, *, head_norm: HeadNorm | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = None if head_norm is None else head_norm(width // num_heads)
        self.k_norm = None if head_norm is None else head_norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryEncoding | None) -> Tensor:
        """Mix tokens: [B, N, width] → [B, N, width]."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).unbind(dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            wide = self.qkv.weight.dtype  # float32 under autocast
            q, k = self.q_norm(q.to(wide)), self.k_norm(k.to(wide))
        if rope is not None:
            q, k = rope(q), rope(k)
        heads = (values.to(v.dtype).transpose(1, 2) for values in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) · W2 x), with W1 and W2 in one matrix. Source: arXiv 2002.05202 equation 6."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: [..., width] → [..., width]."""
        if x.is_cuda and self.hidden % 8:
            return self.padded(x, -self.hidden % SWIGLU_MULTIPLE)
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out

    def padded(self, x: Tensor, padding: int) -> Tensor:
        """Return the same function with hidden channels added that are zero: silu(0) · 0 = 0."""
        w12 = F.pad(self.w12.weight.view(2, self.hidden, -1), (0, 0, 0, padding)).flatten(0, 1)
        b12 = F.pad(self.w12.bias.view(2, self.hidden), (0, padding)).flatten()
        gate, value = F.linear(x, w12, b12).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, F.pad(self.w3.weight, (0, padding)), self.w3.bias)


class GeluMLP(nn.Module):
    """Two linear layers with a tanh-GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: [..., width] → [..., width]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: ModulatedDiTConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = make_norm(width, rms=config.rms_norm, affine=config.norm_affine)
        self.attn = Attention(width, num_heads, head_norm=head_norm_of(config))
        self.norm2 = make_norm(width, rms=config.rms_norm, affine=config.norm_affine)
        self.mlp = (SwiGLU if config.swiglu else GeluMLP)(width, config.mlp_hidden(width))
        self.shift = config.shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, (6 if self.shift else 4) * width))

    def forward(self, x: Tensor, c: Tensor, rope: RotaryEncoding | None) -> Tensor:
        """Apply the block.

        Args:
            x: tokens [B, N, width].
            c: condition [B, 1, width], one for all tokens, or [B, N, width], one a token.
            rope: position encoding of queries and keys, if any.

        Returns:
            Tokens [B, N, width].
        """
        modulation = self.adaLN_modulation(c)
        shift_msa: Tensor | None = None
        shift_mlp: Tensor | None = None
        if self.shift:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        else:
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        x = torch.addcmul(x, gate_msa, self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Normalised, modulated, projected to what one patch holds; starts as zero."""

    def __init__(self, width: int, patch_values: int, *, rms: bool) -> None:
        super().__init__()
        self.norm_final = make_norm(width, rms=rms)
        self.linear = zero_linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, N, width] with condition [B, 1 or N, width] → [B, N, patch_values]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


def zero_linear(width: int, out_width: int) -> nn.Linear:
    """Return a linear layer that starts as zero, so that a new block is the identity.

    Source: arXiv 2212.09748 section 3.2.
    """
    linear = nn.Linear(width, out_width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *others: object, recompute: bool) -> Tensor:
    """Apply blocks one after another.

    Args:
        blocks: the blocks.
        x: tokens [B, N, width].
        others: what each block takes besides: a condition, a position encoding, a mask.
        recompute: keep only each block's input and compute the rest again in the backward pass (activation
            checkpointing): a little over a third more compute for a small part of the memory.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *others)
    return x
