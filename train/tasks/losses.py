"""What the decoder is trained on: pixel and perceptual distance, and an adversary of balanced strength.

Losses are one number an image, so that any share of a batch can be weighted as its rank needs.

Source: arXiv 2012.09841 section 3.1; github:bytetriper/RAE src/disc/gan_loss.py and src/train_stage1.py at a4d18c4.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DiscriminatorLoss = Literal["hinge", "non-saturating"]

MAX_ADAPTIVE_WEIGHT = 1e4
"""Largest adaptive weight. Source: `max_d_weight` in configs/stage1/training."""


def to_symmetric(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] to [-1, 1], the scale of the perceptual distance and the discriminator."""
    return pixels * 2 - 1


def to_8_bit(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as they would look from a file: clamped and rounded to 256 levels. No gradient."""
    levels: Tensor = torch.round((images.clamp(-1, 1) + 1) * 127.5)
    return levels / 127.5 - 1


def pixel_loss(pixels: Tensor, target: Tensor) -> Tensor:
    """Return mean absolute difference, [B, 3, H, W] in [0, 1] twice → float32 [B]. The prediction is not clamped."""
    return (pixels.float() - target.float()).abs().flatten(1).mean(dim=1)


def discriminator_loss(real: Tensor, fake: Tensor, kind: DiscriminatorLoss = "hinge") -> Tensor:
    """Return the discriminator's loss: half the sum over real and fake.

    Args:
        real: logits [B, n] of real images.
        fake: logits [B, n] of made ones.
        kind: "hinge" is relu(1 ∓ logit); "non-saturating" is softplus(∓ logit), the reference's "vanilla".

    Returns:
        float32 [B].
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=1)
    return 0.5 * (F.softplus(-real) + F.softplus(fake)).mean(dim=1)


def generator_loss(fake: Tensor) -> Tensor:
    """Return the decoder's adversarial loss: minus the mean logit, [B, n] → float32 [B]."""
    return -fake.float().mean(dim=1)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Return λ that makes both losses pull on the last layer equally hard: |∇ rec| / (|∇ adv| + 1e-6), at most 1e4.

    Source: calculate_adaptive_weight in src/train_stage1.py; arXiv 2012.09841 equation 7.

    Args:
        reconstruction_gradient: gradient of the reconstruction loss in the last layer's weight.
        adversarial_gradient: gradient of the adversarial loss there, of the same shape.

    Returns:
        float [], without gradient.
    """
    pull = torch.linalg.vector_norm(reconstruction_gradient)
    push = torch.linalg.vector_norm(adversarial_gradient)
    strength: Tensor = pull / (push + 1e-6)
    return strength.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def gradient_at(pixels: Tensor, loss: Tensor, *, scale: float = 1.0) -> Tensor:
    """∂(scale · Σ loss) / ∂pixels, [B, 3, H, W]; what the loss kept to compute it is freed."""
    (gradient,) = torch.autograd.grad(loss.sum() * scale, pixels)
    return gradient


def last_layer_gradients(pixels: Tensor, last_weight: Tensor, *gradients: Tensor) -> list[Tensor]:
    """Propagate gradients at the decoder's pixels to the weight of its last layer; its graph is kept."""
    return [
        torch.autograd.grad(pixels, last_weight, grad_outputs=gradient, retain_graph=True)[0]
        for gradient in gradients
    ]
