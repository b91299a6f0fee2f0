"""What a flat compressor is trained on: reconstructed tokens, and latents near a standard normal.

Source: github:noctrog/flatdino at cdd398f, train.py loss_fn and compute_kl (facts alone); arXiv 2602.04873. The paper's
figure says squared error, the code takes Huber's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.models.flat import Posterior
from train.models.flat_config import FlatConfig

MEAN_KL_WEIGHT = 1e-6 * 512
"""Weight of the mean KL a number of the latents, whatever their shape: the published weight is this over K · F."""


@dataclass(frozen=True, kw_only=True)
class FlatLoss:
    """Weights of the terms; the defaults are the published ones."""

    reconstruction_weight: float = 1.0
    """Weight of the tokens' Huber distance."""
    kl_weight: float | None = None
    """Weight of the KL summed over the K · F numbers of the latents; None: 5.12e-4 / (K · F)."""
    free_bits: float = 0.0
    """Least KL, in nats, that each number of each image's latents counts with."""
    kl_variance_weight: float = 0.0
    """Weight, times `kl_weight`, of the variance of the K latents' KL."""
    inner_weight: float = 1.0
    """Weight of an inner layer's tokens beside the tokens."""

    def weight_of_kl(self, config: FlatConfig) -> float:
        """Return the weight of the summed KL."""
        if self.kl_weight is not None:
            return self.kl_weight
        return MEAN_KL_WEIGHT / (config.num_latents * config.latent_width)


@dataclass(frozen=True, kw_only=True)
class FlatTerms:
    """The terms of the loss, one number an image: float32 [B] each."""

    loss: Tensor
    """Their weighted sum, which is minimised."""
    huber: Tensor
    """Huber distance of the tokens, mean over tokens and channels."""
    inner_huber: Tensor
    """Likewise of an inner layer's; 0 without one."""
    kl: Tensor
    """KL in nats, summed over the numbers of the latents, each at least `free_bits`."""
    kl_variance: Tensor
    """Variance of the K latents' KL."""
    mse: Tensor
    """Squared error of the tokens; told, not minimised."""


def flat_terms(
    posterior: Posterior,
    reconstruction: Tensor,
    tokens: Tensor,
    *,
    config: FlatConfig,
    weights: FlatLoss,
    inner_tokens: Tensor | None = None,
) -> FlatTerms:
    """Return the loss of a batch, image by image.

    Args:
        posterior: what the encoder made of the tokens.
        reconstruction: what the decoder made of a draw of it, [B, N, C] or, with an inner layer, [B, N, 2 C].
        tokens: the stored tokens [B, N, C].
        config: the network's shape.
        weights: of the terms.
        inner_tokens: tokens of the inner layer, [B, N, C], where the decoder puts them out.
    """
    width = config.token_width
    final = reconstruction[..., :width].float()
    huber = huber_distance(final, tokens)
    inner = torch.zeros_like(huber)
    if inner_tokens is not None:
        inner = huber_distance(reconstruction[..., width:].float(), inner_tokens)
    per_latent = divergence(posterior).clamp(min=weights.free_bits).sum(dim=2)
    kl, kl_variance = per_latent.sum(dim=1), per_latent.var(dim=1, correction=0)
    weight = weights.weight_of_kl(config)
    loss = weights.reconstruction_weight * (huber + weights.inner_weight * inner)
    loss = loss + weight * (kl + weights.kl_variance_weight * kl_variance)
    return FlatTerms(
        loss=loss,
        huber=huber,
        inner_huber=inner,
        kl=kl,
        kl_variance=kl_variance,
        mse=(final - tokens).square().flatten(1).mean(dim=1),
    )


def huber_distance(made: Tensor, wanted: Tensor) -> Tensor:
    """½ e² where |e| ≤ 1, |e| − ½ beyond; the mean over all but the first dimension, [B, N, C] twice → [B]."""
    return F.huber_loss(made, wanted, reduction="none", delta=1.0).flatten(1).mean(dim=1)


def divergence(posterior: Posterior) -> Tensor:
    """Return the KL of each number's normal from the standard one in nats: ½ (σ² + μ² − 1 − log σ²), float32 [B, K, F].

    Source: arXiv 1312.6114 appendix B.
    """
    mean, log_variance = posterior.mean.float(), posterior.log_variance.float()
    return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance)
