"""Noise on a decoder's tokens."""

from __future__ import annotations

import pytest
import torch

from train.settings.config import TokenNoise
from train.tasks.reconstruction import noise_scale, noisy

POSITIONS = torch.arange(4000)


@pytest.mark.parametrize(
    ("distribution", "mean", "largest"), [("uniform", 0.4, 0.8), ("half-normal", 0.638, 4.0)]
)
def test_scales_follow_the_named_distribution(distribution, mean, largest):
    # Source of the means: arXiv 2510.11690 section 3 (half-normal) and the published code (uniform).
    scale = noise_scale(POSITIONS, TokenNoise(tau=0.8, distribution=distribution), 0)
    assert scale.min() >= 0
    assert scale.max() <= largest
    assert scale.mean().item() == pytest.approx(mean, abs=0.02)


def test_noise_is_normal_with_the_samples_own_scale():
    noise = TokenNoise(tau=0.8)
    tokens = torch.ones(8, 50, 40)
    added = noisy(tokens, POSITIONS[:8], noise, 0) - tokens
    torch.testing.assert_close(
        added.flatten(1).std(dim=1), noise_scale(POSITIONS[:8], noise, 0), rtol=0.06, atol=0
    )
    assert not torch.equal(added, noisy(tokens, POSITIONS[:8], noise, 1) - tokens)


def test_without_tau_tokens_stay_as_they_are():
    tokens = torch.randn(2, 3, 4)
    assert noisy(tokens, POSITIONS[:2], TokenNoise(tau=0.0), 0) is tokens
