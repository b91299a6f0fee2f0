"""Pooling: a learned affine map over windows of tokens, trained jointly with the decoder of its latents.

Latents keep a grid, a coarser one, and the width of the tokens. The decoder repeats each latent over its window.

Source: "Pooling Representation Autoencoders for Efficient Diffusion", 2026, section 3 (a convolution whose kernel
is its stride).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Shape of a pooling."""

    token_width: int
    """Channels D of a token and of a latent."""
    grid: tuple[int, int]
    """Rows and columns of the tokens."""
    window: tuple[int, int]
    """Rows and columns of tokens that become one latent; they divide the grid."""

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.grid[0] // self.window[0], self.grid[1] // self.window[1]

    @property
    def latent_width(self) -> int:
        """Channels of a latent."""
        return self.token_width

    @property
    def num_latents(self) -> int:
        """Latents of an image."""
        return self.latent_grid[0] * self.latent_grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def deciding(self) -> dict[str, Any]:
        """Return all that decides the latents of tokens, as plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }


class TokenPool(nn.Module):
    """Tokens [B, N, D] on a grid to latents [B, n, D] on a coarser one; starts as the mean of each window."""

    def __init__(self, config: PoolConfig) -> None:
        super().__init__()
        self.config = config
        size = config.window[0] * config.window[1]
        self.map = nn.Linear(size * config.token_width, config.token_width)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(config.token_width).repeat(1, size) / size)
            self.map.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens float [B, N, D], row by row → latents [B, n, D], row by row."""
        (rows, columns), (high, wide) = self.config.latent_grid, self.config.window
        windows = tokens.reshape(len(tokens), rows, high, columns, wide, -1).permute(0, 1, 3, 2, 4, 5)
        latents: Tensor = self.map(windows.reshape(len(tokens), rows * columns, -1))
        return latents

    def encode(self, tokens: Tensor) -> Tensor:
        """See `forward`."""
        latents: Tensor = self(tokens)
        return latents

    def spread(self, latents: Tensor) -> Tensor:
        """Repeat each latent over its window: [B, n, D] → [B, N, D]."""
        (rows, columns), (high, wide) = self.config.latent_grid, self.config.window
        grid = latents.reshape(len(latents), rows, 1, columns, 1, -1)
        return grid.expand(-1, -1, high, -1, wide, -1).reshape(len(latents), self.config.num_tokens, -1)
