"""The flat compressor: a VAE on stored tokens whose latents are a short sequence without a grid.

Encoder and decoder are ViTs of one form. Each reads its result from learned query tokens that stand in front of the
input: the encoder's K queries become the latents, the decoder's N queries become the tokens. Nothing is added to the
encoder's input, whose image encoder has told tokens where they are; the decoder adds a learned position to each latent.

Source: arXiv 2602.04873; github:noctrog/flatdino at cdd398f, models/vit.py, models/transformer.py and autoencoder.py
(facts alone).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.models.compilation import compile_blocks
from train.models.flat_config import FlatConfig, FlatHalfConfig, FlatHalfShape
from train.models.layers import Attention, GeluMLP, SwiGLU, scaled_head_norm

NORM_EPS = 1e-6
"""Added to the variance before the root. Source: VitConfig in models/vit.py."""

INIT_STD, INIT_CUT = 0.02, 0.04
"""Weights, queries and positions are normal with this deviation, cut at this magnitude. Source: models/vit.py."""


class Posterior(NamedTuple):
    """The normal distribution of an image's latents."""

    mean: Tensor
    """[B, K, F]."""
    log_variance: Tensor
    """[B, K, F], not clamped."""


class FlatBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the stream."""

    def __init__(self, config: FlatHalfConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, config.num_heads, head_norm=scaled_head_norm)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = (SwiGLU if config.swiglu else GeluMLP)(width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] → [B, N, width]."""
        x = x + self.attn(self.norm1(x), None)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class FlatHalf(nn.Module):
    """A ViT that reads its output from learned query tokens in front of its input.

    Attributes:
        recompute_activations: recompute blocks in the backward pass instead of keeping what they computed.
    """

    def __init__(self, shape: FlatHalfShape) -> None:
        super().__init__()
        width, depth = shape.config.width, shape.config.depth
        self.shape, self.recompute_activations = shape, False
        self.input_proj = projection(shape.inputs, width)
        self.pos_embed = nn.Parameter(torch.empty(1, shape.num_inputs, width)) if shape.positions else None
        self.queries = nn.Parameter(torch.empty(1, shape.first_query + shape.num_queries, width))
        self.blocks = nn.ModuleList(FlatBlock(shape.config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.output_proj = projection(width, shape.outputs)
        self._initialise()

    def _initialise(self) -> None:
        """Cut normals for weights, queries and positions, zero biases."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=INIT_STD, a=-INIT_CUT, b=INIT_CUT)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_inputs, inputs] → [B, num_queries, outputs]."""
        first = self.shape.first_query
        return self.whole(x)[:, first : first + self.shape.num_queries]

    def whole(self, x: Tensor) -> Tensor:
        """Return the output of the whole sequence, [B, length, outputs]."""
        x = self.input_proj(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        queries = self.queries.expand(len(x), -1, -1)
        x = torch.cat([queries, x.to(queries.dtype)], dim=1)
        for block in self.blocks:
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        out: Tensor = self.output_proj(self.norm(x))
        return out


def projection(inputs: int, outputs: int) -> nn.Module:
    """Return a linear layer without bias, where widths differ."""
    return nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)


class FlatVAE(nn.Module):
    """Tokens to a sequence of latents and back.

    Attributes:
        config: the network's shape.
        encoder: tokens [B, N, C] to mean and log variance, side by side in the channels.
        decoder: latents [B, K, F] to tokens.
    """

    def __init__(self, config: FlatConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FlatHalf(config.encoder_shape)
        self.decoder = FlatHalf(config.decoder_shape)

    @property
    def recompute_activations(self) -> bool:
        """Whether both halves recompute blocks in the backward pass."""
        return self.encoder.recompute_activations

    @recompute_activations.setter
    def recompute_activations(self, value: bool) -> None:
        self.encoder.recompute_activations = self.decoder.recompute_activations = value

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`."""
        compile_blocks([*self.encoder.blocks, *self.decoder.blocks], **options)

    def posterior(self, tokens: Tensor) -> Posterior:
        """Return the distribution of the latents of tokens [B, N, C]."""
        mean, log_variance = self.encoder(tokens).chunk(2, dim=-1)
        return Posterior(mean, log_variance)

    def latents(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Return latents [B, K, F]: a draw with standard normal `noise` [B, K, F], or the mean without."""
        z = posterior.mean
        if noise is not None:
            z = z + noise * torch.exp(posterior.log_variance / 2)
        return torch.tanh(z) if self.config.tanh else z

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, N, C] as a store keeps them: mean latents [B, K, F]."""
        return self.latents(self.posterior(tokens))

    def decode(self, latents: Tensor) -> Tensor:
        """Return latents [B, K, F] → tokens [B, N, C]."""
        out: Tensor = self.decoder(latents)[..., : self.config.token_width]
        return out

    def forward(self, tokens: Tensor, noise: Tensor) -> tuple[Posterior, Tensor]:
        """Return everything the loss compares.

        Args:
            tokens: [B, N, C].
            noise: standard normal [B, K, F].

        Returns:
            The distribution of the latents, and the tokens decoded from a draw of it, [B, N, C] or, with an inner
            layer, [B, N, 2 C].
        """
        posterior = self.posterior(tokens)
        return posterior, self.decoder(self.latents(posterior, noise))
