"""What one writes from the papers' text: both generations' networks in separate small steps of eager PyTorch.

They compute with the weights of ours and are what benchmarks/step.py compares ours with.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.dit_dh import DiTDH
from train.models.in_context_dit import DeepBlock, InContextDiTDH, ModulatedFinalLayer
from train.models.layers import Block


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm, step by step."""
    assert isinstance(norm.weight, Tensor)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding by a rotated copy, x [B, H, N, head_width]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
    """Attention, by PyTorch's kernel or step by step."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def plain_block(block: Block, x: Tensor, c: Tensor, rope: nn.Module, *, fused_attention: bool) -> Tensor:
    """One block as the paper writes it down."""
    c = c.expand(-1, x.shape[1], -1) if c.shape[1] == x.shape[1] else c
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=-1)
    attention = block.attn
    y = plain_norm(block.norm1, x) * (1 + scale_1) + shift_1
    qkv = attention.qkv(y).reshape(*y.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = (plain_rotation(part, rope.freqs_cos, rope.freqs_sin).to(v.dtype) for part in (q, k))
    y = attend(q, k, v, fused=fused_attention)
    x = x + gate_1 * attention.proj(y.transpose(1, 2).flatten(2))
    y = plain_norm(block.norm2, x) * (1 + scale_2) + shift_2
    gate, value = block.mlp.w12(y).chunk(2, dim=-1)
    return x + gate_2 * block.mlp.w3(F.silu(gate) * value)


class PlainDiTDH(nn.Module):
    """DiT-DH over the same weights, written plainly."""

    def __init__(self, model: DiTDH, *, fused_attention: bool) -> None:
        super().__init__()
        self.model = model
        self.fused_attention = fused_attention

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity, as `DiTDH.forward`."""
        m, depth = self.model, self.model.config.depth
        time = m.t_embedder(t)
        c = F.silu(time + m.y_embedder(y))[:, None]
        s = m.s_embedder(x_t) + m.pos_embed
        for block in m.blocks[:depth]:
            s = plain_block(block, s, c, m.enc_feat_rope, fused_attention=self.fused_attention)
        s = m.s_projector(F.silu(time[:, None].repeat(1, s.shape[1], 1) + s))
        x = m.x_embedder(x_t)
        for block in m.blocks[depth:]:
            x = plain_block(block, x, s, m.dec_feat_rope, fused_attention=self.fused_attention)
        shift, scale = m.final_layer.adaLN_modulation(s).chunk(2, dim=-1)
        x = m.final_layer.linear(plain_norm(m.final_layer.norm_final, x) * (1 + scale) + shift)
        rows, columns = m.config.token_grid
        return x.reshape(len(x), rows, columns, -1).permute(0, 3, 1, 2)


def plain_in_context_block(
    block: DeepBlock, x: Tensor, s: Tensor | None, rope: nn.Module, *, fused_attention: bool
) -> Tensor:
    """One of RAEv2's blocks: of the deep part where s is None, else of the head."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
        (0.0, 0.0, 1.0) * 2 if s is None else block.adaln_modulation(s).chunk(6, dim=-1)
    )
    attention, head = block.attn, (x.shape[0], x.shape[1], block.attn.num_heads, -1)
    y = plain_norm(block.norm1, x)
    if s is not None:
        y = y * (1 + scale_1) + shift_1
    q = plain_norm(attention.q_norm, attention.q(y).reshape(head)).transpose(1, 2)
    k = plain_norm(attention.k_norm, attention.k(y).reshape(head)).transpose(1, 2)
    v = attention.v(y).reshape(head).transpose(1, 2)
    q, k = (plain_rotation(part, rope.freqs_cos, rope.freqs_sin).to(v.dtype) for part in (q, k))
    y = attention.proj(attend(q, k, v, fused=fused_attention).transpose(1, 2).flatten(2))
    x = x + (y if s is None else gate_1 * y)
    y = plain_norm(block.norm2, x)
    if s is not None:
        y = y * (1 + scale_2) + shift_2
    y = block.mlp.w3(F.silu(block.mlp.w1(y)) * block.mlp.w2(y))
    return x + (y if s is None else gate_2 * y)


def plain_modulated_output(layer: ModulatedFinalLayer, x: Tensor, s: Tensor, grid: tuple[int, int]) -> Tensor:
    """RAEv2's last layer, as an image."""
    shift, scale = layer.adaln_modulation(s).chunk(2, dim=-1)
    x = layer.linear(plain_norm(layer.norm, x) * (1 + scale) + shift)
    return x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)


class PlainInContextDiTDH(nn.Module):
    """RAEv2's transformer for labels over the same weights, written plainly."""

    def __init__(self, model: InContextDiTDH, *, fused_attention: bool) -> None:
        super().__init__()
        self.model = model
        self.fused_attention = fused_attention

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and the base prediction, as `InContextDiTDH.forward`."""
        m, config, fused = self.model, self.model.config, self.fused_attention
        time = m.t_embedder(t)
        image = m.s_embedder(x_t)
        tokens = torch.cat([image, m.t_embedder.tokens(time), m.ctx_embedder(y)], dim=1)
        base = image
        for number, block in enumerate(m.blocks[: config.depth], start=1):
            tokens = plain_in_context_block(block, tokens, None, m.enc_rope, fused_attention=fused)
            if number == config.base_depth:
                base = F.silu(time[:, None] + tokens[:, : image.shape[1]])
        s = m.s_projector(F.silu(time[:, None] + tokens[:, : image.shape[1]]))
        x = m.x_embedder(x_t)
        for block in m.blocks[config.depth :]:
            x = plain_in_context_block(block, x, s, m.dec_rope, fused_attention=fused)
        return (
            plain_modulated_output(m.final_layer, x, s, config.token_grid),
            plain_modulated_output(m.base_final_layer, base, base, config.token_grid),
        )


def plain_network(model: nn.Module, *, fused_attention: bool) -> nn.Module:
    """Write a network of either generation plainly, over a copy of its weights."""
    kind = PlainDiTDH if isinstance(model, DiTDH) else PlainInContextDiTDH
    return kind(copy.deepcopy(model), fused_attention=fused_attention)
