"""Mean and covariance of feature vectors, streamed and merged exactly.

A Fréchet distance needs only the count, the mean and the scatter matrix of a set of features. Each
process adds its features block by block; the partial results merge to what one pass over everything
would give, up to float64 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shards import UsageError


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The normal distribution fitted to a set of features, for a Fréchet distance."""

    mean: NDArray[np.float64]
    """float64 [D]."""
    covariance: NDArray[np.float64]
    """float64 [D, D], symmetric."""
    count: int | None
    """How many feature vectors it was estimated from; None where a published file does not say."""

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """The symmetric square root of the covariance, float64 [D, D]; eigenvalues below 0 are rounding."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
        return root

    def __post_init__(self) -> None:
        width = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (width, width):
            raise UsageError(
                "feature statistics must be a mean [D] and a covariance [D, D], "
                f"got {list(self.mean.shape)} and {list(self.covariance.shape)}"
            )


class FeatureMoments:
    """Count, mean and scatter matrix of the features seen so far, in float64.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979), in its matrix form.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(width)
        self.scatter: NDArray[np.float64] = np.zeros((width, width))

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Self:
        """Return the moments of one block of features, float [n, D]."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: NDArray[np.floating]) -> None:
        """Add a block of features, float [n, D]."""
        if len(features) == 0:
            return
        block = features.astype(np.float64)
        mean = block.mean(axis=0)
        centred = block - mean
        self._combine(len(block), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Add what another process saw."""
        self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Return mean and unbiased covariance (divided by n − 1), as `numpy.cov` gives them.

        Raises:
            UsageError: Fewer than two features were added.
        """
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 images, got {self.count}; give more images")
        return Gaussian(mean=self.mean, covariance=self.scatter / (self.count - 1), count=self.count)
