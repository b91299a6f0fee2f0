"""Between raw tokens and the normalised latents a DiT is trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shards import UsageError

EPS = 1e-5
"""Added to the variance inside the root. Source: github:bytetriper/RAE src/stage1/rae.py at a4d18c4."""


class LatentNormalizer(nn.Module):
    """Normalise each channel at each place: z = (tokens − mean) / √(variance + eps).

    Statistics are over images, one number a channel and place [D, h, w]. The published files have no mean;
    then it is zero, and published DiTs were trained that way.

    Source: github:bytetriper/RAE src/stage1/rae.py at a4d18c4.

    Attributes:
        mean: float32 [D, h, w], or None where there is none.
        variance: float32 [D, h, w].
        eps: added to the variance inside the root.
    """

    mean: Tensor | None
    variance: Tensor

    def __init__(self, mean: Tensor | None, variance: Tensor, eps: float = EPS) -> None:
        """Build from statistics of any float type.

        Raises:
            UsageError: the shapes are not [D, h, w] or differ, or the numbers are not finite or a variance is negative.
        """
        super().__init__()
        if variance.ndim != 3 or (mean is not None and mean.shape != variance.shape):
            raise UsageError(
                "latent statistics must be [D, h, w], mean and variance alike; got "
                f"mean {None if mean is None else list(mean.shape)} and variance {list(variance.shape)}"
            )
        if not all(bool(torch.isfinite(values).all()) for values in (mean, variance) if values is not None):
            raise UsageError(
                "latent statistics must be finite numbers; compute them again or give another file"
            )
        if bool((variance < 0).any()):
            raise UsageError(f"a variance cannot be negative; the smallest here is {variance.min().item():g}")
        self.eps = eps
        self.register_buffer("mean", None if mean is None else mean.float())
        self.register_buffer("variance", variance.float())

    @property
    def std(self) -> Tensor:
        """√(variance + eps), [D, h, w]."""
        return torch.sqrt(self.variance + self.eps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of the latent."""
        return self.variance.shape[1], self.variance.shape[2]

    def same_as(self, other: LatentNormalizer) -> bool:
        """Return whether both normalise by exactly the same numbers."""
        ours, theirs = self.state_dict(), other.state_dict()
        return (
            self.eps == other.eps
            and ours.keys() == theirs.keys()
            and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
        )

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Return raw tokens [B, h·w, D] of any float type → normalised latents float32 [B, D, h, w]."""
        latents = tokens.float().transpose(1, 2).reshape(len(tokens), *self.variance.shape)
        if self.mean is not None:
            latents = latents - self.mean
        return latents / self.std

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Return normalised latents [B, D, h, w] → raw tokens float32 [B, h·w, D]."""
        tokens: Tensor = latents.float() * self.std
        if self.mean is not None:
            tokens = tokens + self.mean
        return tokens.flatten(2).transpose(1, 2)
