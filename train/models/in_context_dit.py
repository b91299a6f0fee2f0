"""RAEv2's transformers: time and condition are tokens of the sequence, and a second output reads an early block.

The deep blocks have no adaptive normalisation: they see time and condition by attending to their tokens, which have no
position. `InContextDiTDH` has DiT-DH's wide head, modulated token by token by what the deep blocks make of the image;
`InContextDiT` has no head and no modulation. The output of an early block, the base output, is what internal guidance
moves away from. Outputs are what the network is trained to predict: the data, in the published recipe.

Module names are those of the published weights.

Source: written from RAEv2 (arXiv 2605.18324) and the keys, shapes and recorded values of github:nanovisionx/RAEv2 at
8a0d238; rotary encoding: arXiv 2104.09864; normalised queries and keys: arXiv 2302.05442.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.compilation import compile_blocks
from train.models.condition_tokens import Condition, ScalarTokens, condition_tokens
from train.models.config import InContextDiTConfig, swiglu_width
from train.models.embeddings import (
    PatchEmbedding,
    RotaryEncoding,
    embed_times,
    end_time_embedding,
    unpatchify,
)
from train.models.layers import NORM_EPS, SWIGLU_MULTIPLE, modulate, run_blocks, zero_linear

Outputs = Tensor | tuple[Tensor, ...]
"""The prediction alone, or with what else a network puts out."""


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised a head, then turned by their place."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // num_heads, eps=NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, rope: RotaryEncoding, mask: Tensor | None) -> Tensor:
        """Mix tokens: [B, N, width] → [B, N, width]; `mask`: bool [B, 1, 1, N], which tokens are attended to."""
        heads = (*x.shape[:2], self.num_heads, -1)
        v = self.v(x).view(heads)
        q, k = (
            rope(norm(linear(x).view(heads).to(norm.weight.dtype))).to(v.dtype)  # float32 under autocast
            for linear, norm in ((self.q, self.q_norm), (self.k, self.k_norm))
        )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) · W2 x). Source: arXiv 2002.05202 equation 6."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: [..., width] → [..., width]."""
        if x.is_cuda and self.hidden % 8:
            return self.padded(x, -self.hidden % SWIGLU_MULTIPLE)
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out

    def padded(self, x: Tensor, padding: int) -> Tensor:
        """Return the same function with hidden channels added that are zero: silu(0) · 0 = 0."""
        gate, value = (
            F.linear(x, F.pad(linear.weight, (0, 0, 0, padding)), F.pad(linear.bias, (0, padding)))
            for linear in (self.w1, self.w2)
        )
        return F.linear(F.silu(gate) * value, F.pad(self.w3.weight, (0, padding)), self.w3.bias)


class DeepBlock(nn.Module):
    """Attention and MLP, each normalised and added; nothing modulates them."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width, swiglu_width(width, mlp_ratio))

    def forward(self, x: Tensor, rope: RotaryEncoding, mask: Tensor | None) -> Tensor:
        """[B, N, width] → [B, N, width]."""
        x = x + self.attn(self.norm1(x), rope, mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class HeadBlock(DeepBlock):
    """A block that each token's own condition shifts, scales and gates (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 6 * width))

    def forward(self, x: Tensor, s: Tensor, rope: RotaryEncoding) -> Tensor:  # type: ignore[override]
        """[B, N, width] with conditions s [B, N, width] → [B, N, width]."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaln_modulation(s).chunk(
            6, -1
        )
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rope, None)
        x = torch.addcmul(x, gate_attn, attended)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Normalised and projected to what one patch holds; starts as zero."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=NORM_EPS)
        self.linear = zero_linear(width, patch_values)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] → [B, N, patch_values]."""
        out: Tensor = self.linear(self.norm_final(x))
        return out


class ModulatedFinalLayer(nn.Module):
    """Normalised, modulated token by token, and projected to what one patch holds; starts as zero."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.linear = zero_linear(width, patch_values)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), zero_linear(width, 2 * width))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """[B, N, width] with conditions s [B, N, width] → [B, N, patch_values]."""
        shift, scale = self.adaln_modulation(s).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


def alignment_projection(width: int, hidden: int, out_width: int) -> nn.Sequential:
    """Build the projection of image tokens to another encoder's: three layers. Source: arXiv 2410.06940 (REPA)."""
    widths = (width, hidden, hidden, out_width)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


class _InContext(nn.Module):
    """The deep part and its conditions; the two networks add how the image enters and leaves.

    Attributes:
        config: the network's shape.
        recompute_activations: recompute blocks in the backward pass instead of keeping what they computed.
    """

    final_layer: nn.Module
    base_final_layer: nn.Module | None

    def __init__(self, config: InContextDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        self.t_embedder = ScalarTokens(config.num_time_tokens, config.width)
        self.r_embedder = end_time_embedding(config.width) if config.end_time else None
        self.cfg_w_embedder = (
            ScalarTokens(config.num_scale_tokens, config.width) if config.num_scale_tokens else None
        )
        self.ctx_embedder = condition_tokens(config)
        self.alignment = (
            None
            if config.alignment_width is None
            else alignment_projection(config.width, config.alignment_hidden, config.alignment_width)
        )
        self.blocks = nn.ModuleList(
            DeepBlock(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`."""
        outputs = (self.final_layer, self.base_final_layer)
        compile_blocks([*self.blocks, *(layer for layer in outputs if layer is not None)], **options)

    def _rotary_encoding(self) -> RotaryEncoding:
        config = self.config
        others = config.sequence_length - config.token_grid[0] * config.token_grid[1]
        return RotaryEncoding(config.width // config.num_heads, config.token_grid, config.positions, others)

    def _deep(
        self,
        image: Tensor,
        time: Tensor,
        rope: RotaryEncoding,
        condition: Condition,
        mask: Tensor | None,
        scale: Tensor | None,
    ) -> dict[int, Tensor]:
        """Run the deep blocks on image, time, scale and condition tokens in a row.

        Args:
            image: image tokens [B, N, width].
            time: embedding of the time [B, width].
            rope: positions of the image tokens; the others have none.
            condition: see `Condition`.
            mask: bool or 0 and 1, [B, m]: which of the last m tokens are attended to; None: all.
            scale: guidance scale float [B], where it is a condition.

        Returns:
            Image tokens [B, N, width] by the number of blocks they went through: all, and where others read them.
        """
        config = self.config
        parts = [image, self.t_embedder.tokens(time)]
        if self.cfg_w_embedder is not None:
            assert scale is not None, "this network is conditioned on a guidance scale"
            parts.append(self.cfg_w_embedder.tokens(self.cfg_w_embedder(scale)))
        if self.ctx_embedder is not None:
            parts.append(self.ctx_embedder(condition))
        x = torch.cat([part.to(image.dtype) for part in parts], dim=1)
        if mask is not None:  # never all true: a mask keeps attention from its fastest kernels
            mask = F.pad(mask.bool(), (x.shape[1] - mask.shape[1], 0), value=True)[:, None, None]
        found: dict[int, Tensor] = {}
        start = 0
        for end in sorted({config.base_depth or 0, config.alignment_depth or 0, config.depth} - {0}):
            x = run_blocks(self.blocks[start:end], x, rope, mask, recompute=self.recompute_activations)
            found[end], start = x[:, : image.shape[1]], end
        return found

    def _put_out(self, outputs: list[Tensor], deep: dict[int, Tensor], *, align: bool) -> Outputs:
        """Return the outputs and, if asked for, the projection of the image tokens to another encoder's."""
        if align:
            assert self.alignment is not None, "this network was built without a projection to align"
            assert self.config.alignment_depth is not None
            outputs.append(self.alignment(deep[self.config.alignment_depth]))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _image(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.token_grid, self.config.patch_size)


class InContextDiT(_InContext):
    """The plain form: what the deep blocks make of the image is projected to the prediction."""

    def __init__(self, config: InContextDiTConfig) -> None:
        super().__init__(config)
        self.x_embedder = PatchEmbedding(config.token_width, config.width, config.patch_size)
        self.rope = self._rotary_encoding()
        self.final_layer = FinalLayer(config.width, config.patch_values)
        self.base_final_layer = FinalLayer(config.width, config.patch_values) if config.base_depth else None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition = None,
        mask: Tensor | None = None,
        scale: Tensor | None = None,
        r: Tensor | None = None,
        *,
        align: bool = False,
    ) -> Outputs:
        """See `InContextDiTDH.forward`."""
        time = embed_times(self.t_embedder, self.r_embedder, t, r)
        deep = self._deep(self.x_embedder(x_t), time, self.rope, condition, mask, scale)
        outputs = [self._image(self.final_layer(deep[self.config.depth]))]
        if self.base_final_layer is not None:
            assert self.config.base_depth is not None
            outputs.append(self._image(self.base_final_layer(deep[self.config.base_depth])))
        return self._put_out(outputs, deep, align=align)


class InContextDiTDH(_InContext):
    """The form with a wide head, which sees the noisy latent itself."""

    def __init__(self, config: InContextDiTConfig) -> None:
        super().__init__(config)
        width, head_width, head_num_heads = config.width, config.head_width, config.head_num_heads
        assert head_width is not None
        self.s_embedder = PatchEmbedding(config.token_width, width, config.patch_size)
        self.x_embedder = PatchEmbedding(config.token_width, head_width, config.patch_size)
        self.enc_rope = self._rotary_encoding()
        self.dec_rope = RotaryEncoding(head_width // head_num_heads, config.token_grid, config.positions)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.blocks.extend(
            HeadBlock(head_width, head_num_heads, config.mlp_ratio) for _ in range(config.head_depth)
        )
        self.final_layer = ModulatedFinalLayer(head_width, config.patch_values)
        self.base_final_layer = ModulatedFinalLayer(width, config.patch_values) if config.base_depth else None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition = None,
        mask: Tensor | None = None,
        scale: Tensor | None = None,
        r: Tensor | None = None,
        *,
        align: bool = False,
    ) -> Outputs:
        """Predict the data, or what else the network is trained to predict.

        Args:
            x_t: noisy latents float [B, D, h, w].
            t: time float [B] in [0, 1]; 0 is data, 1 is noise.
            condition: classes int64 [B] in [0, num_classes], where num_classes is no class; or as `Condition` says.
            mask: of a text, bool or 0 and 1, [B, m]: which of the last m tokens of the text are attended to.
            scale: guidance scale float [B], where the network is conditioned on it.
            r: end of the jump from t, float [B], of a network with `end_time`; None: r = t. There are no published
                weights of such a one: r is embedded with t, as in DiT-DH.
            align: also give the projection [B, N, alignment_width] of the image tokens, which REPA trains, at the end.

        Returns:
            The prediction [B, D, h, w]; where there is a base output, that prediction and the base one.
        """
        time = embed_times(self.t_embedder, self.r_embedder, t, r)
        deep = self._deep(self.s_embedder(x_t), time, self.enc_rope, condition, mask, scale)
        # SiLU here and again inside every modulation: so the published weights were trained.
        s = self.s_projector(F.silu(time[:, None] + deep[self.config.depth]))
        head = self.blocks[self.config.depth :]
        x = run_blocks(head, self.x_embedder(x_t), s, self.dec_rope, recompute=self.recompute_activations)
        outputs = [self._image(self.final_layer(x, s))]
        if self.base_final_layer is not None:
            assert self.config.base_depth is not None
            c = F.silu(time[:, None] + deep[self.config.base_depth])
            outputs.append(self._image(self.base_final_layer(c, c)))
        return self._put_out(outputs, deep, align=align)
