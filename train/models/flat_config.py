"""Shape of the flat compressor: FlatDINO's VAE, which makes a short sequence of latents of a grid of tokens. No torch.

Source of every number: arXiv 2602.04873; github:noctrog/flatdino at cdd398f.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from shards import UsageError


class FlatSize(NamedTuple):
    """Width, number of blocks, heads and MLP width of one half of a flat compressor."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int


FLAT_SIZES = {
    "t": FlatSize(192, 12, 3, 768),
    "s": FlatSize(384, 12, 6, 1536),
    "b": FlatSize(768, 12, 12, 3072),
    "l": FlatSize(1024, 24, 16, 4096),
}
"""The sizes its names speak of: `sb` is an encoder of size s and a decoder of size b.

The MLP width is a plain ViT's, four times the width, although the MLPs are SwiGLU. Source: flatdino/models/vit.py.
"""


@dataclass(frozen=True, kw_only=True)
class FlatHalfConfig:
    """One half, encoder or decoder: a ViT whose output is read from learned query tokens."""

    width: int
    """Width of the residual stream."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads a block; queries and keys are normalised a head."""
    mlp_width: int
    """Hidden width of the MLPs."""
    swiglu: bool = True
    """SwiGLU MLPs, as published; otherwise tanh-GELU."""
    disposable_queries: int = 0
    """Further learned tokens in front of the query tokens, whose output is dropped."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        for name in ("width", "depth", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"a flat compressor's {name} must be at least 1; got {getattr(self, name)}")
        if self.disposable_queries < 0:
            raise UsageError(f"disposable_queries must be 0 or more; got {self.disposable_queries}")
        if self.width % self.num_heads:
            raise UsageError(
                f"a flat compressor's width must be a multiple of its number of heads; got {self.width} and "
                f"{self.num_heads}"
            )


class FlatHalfShape(NamedTuple):
    """What one half takes in and puts out."""

    config: FlatHalfConfig
    num_inputs: int
    """Tokens of its input."""
    inputs: int
    """Channels of its input; a projection is needed only where they are not the width."""
    num_queries: int
    """Tokens it puts out."""
    outputs: int
    """Channels it puts out; likewise."""
    positions: bool
    """Whether its input gets learned positions."""

    @property
    def first_query(self) -> int:
        """Place of the first query token whose output is used."""
        return self.config.disposable_queries

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.first_query + self.num_queries + self.num_inputs


@dataclass(frozen=True, kw_only=True)
class FlatConfig:
    """A flat compressor: N tokens of width C to K latents of width F, and back."""

    num_tokens: int
    """Tokens N of an image."""
    token_width: int
    """Channels C of a token."""
    num_latents: int
    """Latents K of an image, a sequence without a grid."""
    latent_width: int
    """Channels F of a latent."""
    encoder: FlatHalfConfig
    """Tokens to the mean and log variance of the latents."""
    decoder: FlatHalfConfig
    """Latents to tokens."""
    tanh: bool = False
    """Squash latents to (-1, 1) after they are drawn."""
    inner_layer: bool = False
    """The decoder puts out a second set of tokens, those of an inner layer of the image encoder."""
    kind: Literal["flat"] = "flat"
    """Which network this configures."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        for name in ("num_tokens", "token_width", "num_latents", "latent_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"a flat compressor's {name} must be at least 1; got {getattr(self, name)}")

    @property
    def latent_grid(self) -> tuple[int, int]:
        """How a store holds the sequence: one row of K latents."""
        return 1, self.num_latents

    def deciding(self) -> dict[str, Any]:
        """Return all that decides the latents of tokens, as plain JSON values; the decoder does not."""
        values = asdict(self)
        for name in ("decoder", "inner_layer", "kind"):
            del values[name]
        return values

    @property
    def encoder_shape(self) -> FlatHalfShape:
        """The half that makes latents; mean and log variance are side by side in its channels."""
        return FlatHalfShape(
            config=self.encoder,
            num_inputs=self.num_tokens,
            inputs=self.token_width,
            num_queries=self.num_latents,
            outputs=2 * self.latent_width,
            positions=False,
        )

    @property
    def decoder_shape(self) -> FlatHalfShape:
        """The half that makes tokens, and with an inner layer another set behind them in the channels."""
        return FlatHalfShape(
            config=self.decoder,
            num_inputs=self.num_latents,
            inputs=self.latent_width,
            num_queries=self.num_tokens,
            outputs=self.token_width * (2 if self.inner_layer else 1),
            positions=True,
        )
