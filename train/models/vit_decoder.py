"""ViT decoder: tokens of the frozen encoder back to pixels.

A plain pre-norm ViT over the tokens and one learned token that is dropped at the end. It eats raw tokens,
before any latent normalisation. Module names are those of the published weights, which descend from
ViT-MAE's decoder.

Source: arXiv 2510.11690 section 3; github:bytetriper/RAE src/stage1/decoders/decoder.py at a4d18c4.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards import UsageError
from train.models.compilation import compile_blocks
from train.models.config import ViTDecoderConfig
from train.models.embeddings import sincos_table, unpatchify
from train.models.pool import PoolConfig, TokenPool

NORM_EPS = 1e-12
"""Added to the variance before the root. Source: github:bytetriper/RAE configs/decoder/ViTXL/config.json."""


class _SelfAttention(nn.Module):
    """Queries, keys and values, each from a linear layer of its own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _named(**modules: nn.Module) -> nn.Sequential:
    """Return modules applied one after another under the names the published weights give them."""
    return nn.Sequential(OrderedDict(modules))


class _DecoderBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the stream."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = _named(
            attention=_SelfAttention(width, num_heads), output=_named(dense=nn.Linear(width, width))
        )
        self.layernorm_after = nn.LayerNorm(width, eps=NORM_EPS)
        self.intermediate = _named(dense=nn.Linear(width, mlp_width))
        self.output = _named(dense=nn.Linear(mlp_width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        out: Tensor = x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))
        return out


class ViTDecoder(nn.Module):
    """Pixels from raw tokens.

    Attributes:
        config: the network's shape.
        recompute_activations: recompute blocks in the backward pass instead of keeping what they computed.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ViTDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        width = config.width

        self.decoder_embed = nn.Linear(config.token_width, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter, as in the published weights; frozen until the trainer says otherwise. The extra
        # token's row is 0.
        table = F.pad(sincos_table(width, config.grid), (0, 0, 1, 0))
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_layers = nn.ModuleList(
            _DecoderBlock(width, config.num_heads, config.mlp_width) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * 3)
        self.pool = None
        if config.pool is not None:
            self.pool = TokenPool(
                PoolConfig(token_width=config.token_width, grid=config.grid, window=config.pool)
            )
        # Not in the published weights: they belong to the encoder.
        for name, values in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, tokens: Tensor, latent_noise: Tensor | None = None) -> Tensor:
        """Decode tokens to pixels.

        Args:
            tokens: raw encoder tokens float [B, N, D] on a square grid, or on `config.grid`; a pooling decoder takes
                the latents [B, n, D] of its own pooling as well.
            latent_noise: added to the latents of a pooling decoder, [B, n, D].

        Returns:
            Pixels [B, 3, H, W], nominally in [0, 1] and not clamped.
        """
        if latent_noise is not None:
            assert self.pool is not None, "only a pooling decoder has latents"
            tokens = self.pool(tokens) + latent_noise
        return self.forward_normalised(tokens) * self.pixel_std + self.pixel_mean

    def forward_normalised(self, tokens: Tensor) -> Tensor:
        """Decode tokens to pixels in the encoder's normalised scale: [B, N, D] → [B, 3, H, W]."""
        return unpatchify(self.patches(tokens), self.config.grid, self.config.patch_size)

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the values of each patch before they are laid out: [B, N, D] → [B, num_patches, p·p·3]."""
        out: Tensor = self.decoder_pred(self.features(tokens))
        return out

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`.

        The last layer stays as it is: the adversarial balance asks for its gradient by itself, and a compiled piece can
        only be gone back through as a whole.
        """
        compile_blocks(self.decoder_layers, **options)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the input of the last layer: [B, N, D] → [B, num_patches, width]."""
        if self.pool is not None:
            pooled = self.pool(tokens) if tokens.shape[1] == self.pool.config.num_tokens else tokens
            tokens = self.pool.spread(pooled)
        x = self._resized(self.decoder_embed(tokens))
        x = torch.cat([self.trainable_cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_layers:
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        # Drop the extra token before the last layer rather than after: one row less to compute, the same
        # values.
        out: Tensor = self.decoder_norm(x[:, 1:])
        return out

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, at which the adversarial loss is balanced."""
        return self.decoder_pred.weight

    def _resized(self, x: Tensor) -> Tensor:
        """Resize the grid of embedded tokens to the decoder's own, if it differs."""
        if x.shape[1] == self.config.num_patches:
            return x
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1]:
            raise UsageError(
                f"tokens on another grid than the decoder's {self.config.grid[0]}×{self.config.grid[1]} must "
                f"form a square; got {x.shape[1]} tokens"
            )
        grid = x.transpose(1, 2).reshape(*x.shape[::2], side, side)
        resized = F.interpolate(grid, size=self.config.grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)
