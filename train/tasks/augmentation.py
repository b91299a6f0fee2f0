"""Differentiable augmentation of what the discriminator sees, real and made images alike.

Source: arXiv 2006.10738; github:bytetriper/RAE src/disc/diffaug.py at a4d18c4, which is StyleGAN-T's.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_COINS = 2
"""Uniform draws a batch: whether to move, whether to recolour."""

NUM_DRAWS = 5
"""Uniform draws an image: rows and columns to move, brightness, saturation, contrast."""

MAX_MOVE = 0.125
"""Largest move as a share of the side. Source: `ratio` in DiffAug.aug."""


def augment(images: Tensor, coins: Tensor, draws: Tensor, *, probability: float = 1.0) -> Tensor:
    """Move and recolour, each for the whole batch or not at all, with its own amounts an image.

    Draws are arguments, so that the caller decides what they depend on; real and made images get draws of their own.
    The reference can cut a hole as well, which no published recipe does.

    Args:
        images: [B, 3, H, W]; their mean and contrast change, whatever their scale.
        coins: uniform [2] in [0, 1); an operation runs where its coin is at most `probability`.
        draws: uniform [5, B] in [0, 1).
        probability: chance of each operation; 0 is none.

    Returns:
        float32 [B, 3, H, W].
    """
    images, draws = images.float(), draws.reshape(NUM_DRAWS, -1)
    move, recolour = (bool(coin <= probability) and probability > 0 for coin in coins)
    if move:
        images = _moved(images, draws[0], draws[1])
    if recolour:
        images = _recoloured(images, *(draw.view(-1, 1, 1, 1) for draw in draws[2:]))
    return images


def _moved(images: Tensor, row_draw: Tensor, column_draw: Tensor) -> Tensor:
    """Move each image by whole pixels and fill with zeros what comes into view."""
    for dim, draw in ((2, row_draw), (3, column_draw)):
        size = images.shape[dim]
        most = round(size * MAX_MOVE)
        distance = (draw * (2 * most + 1)).floor().long() - most
        source = torch.arange(size, device=images.device) + distance[:, None]
        shape = [len(images), 1, 1, 1]
        shape[dim] = size
        source = source.view(shape)
        inside = (source >= 0) & (source < size)
        images = torch.take_along_dim(images, source.clamp(0, size - 1), dim) * inside
    return images


def _recoloured(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Return brightness by −0.5…0.5, saturation by 0…2 about each pixel's grey, contrast by 0.5…1.5 about the mean."""
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean
