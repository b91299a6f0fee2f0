"""Differentiable augmentation of what the discriminator sees, real and made pictures alike.

Source: arXiv 2006.10738; github:bytetriper/RAE src/disc/diffaug.py at a4d18c4, which is StyleGAN-T's.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_COINS = 3
"""Uniform draws a batch: whether to move, to recolour, to cut out."""

NUM_DRAWS = 7
"""Uniform draws a picture: rows and columns to move, brightness, saturation, contrast, row and column to cut out."""

MAX_MOVE = 0.125
"""Largest move as a share of the side. Source: `ratio` in DiffAug.aug."""


def augment(
    images: Tensor, coins: Tensor, draws: Tensor, *, probability: float = 1.0, cutout: float = 0.0
) -> Tensor:
    """Move, recolour and cut out, each for the whole batch or not at all, with its own amounts a picture.

    Draws are arguments, so that the caller decides what they depend on; real and made pictures get draws of their own.

    Args:
        images: [B, 3, H, W]; their mean and contrast change, whatever their scale.
        coins: uniform [3] in [0, 1); an operation runs where its coin is at most `probability`.
        draws: uniform [7, B] in [0, 1).
        probability: chance of each operation; 0 is none.
        cutout: side of the hole as a share of the picture's; 0 in the published recipe, which makes no hole.

    Returns:
        float32 [B, 3, H, W].
    """
    images, draws = images.float(), draws.reshape(NUM_DRAWS, -1)
    move, recolour, cut = (bool(coin <= probability) and probability > 0 for coin in coins)
    if move:
        images = _moved(images, draws[0], draws[1])
    if recolour:
        images = _recoloured(images, *(draw.view(-1, 1, 1, 1) for draw in draws[2:5]))
    if cut and cutout > 0:
        images = _with_hole(images, draws[5], draws[6], cutout)
    return images


def _moved(images: Tensor, row_draw: Tensor, column_draw: Tensor) -> Tensor:
    """Move each picture by whole pixels and fill with zeros what comes into view."""
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
    """Brightness by −0.5…0.5, saturation by 0…2 about each pixel's grey, contrast by 0.5…1.5 about the mean."""
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _with_hole(images: Tensor, row_draw: Tensor, column_draw: Tensor, cutout: float) -> Tensor:
    """Set a rectangle around a random place to zero, as far as it lies in the picture."""
    covered = []
    for dim, draw in ((2, row_draw), (3, column_draw)):
        size = images.shape[dim]
        extent = round(size * cutout)
        first = (draw * (size + (1 - extent % 2))).floor().long()[:, None] - extent // 2
        place = torch.arange(size, device=images.device)
        # The reference clamps the hole's pixels into the picture, so at a border it covers the last row at least.
        low, high = first.clamp(0, size - 1), (first + extent - 1).clamp(0, size - 1)
        covered.append((place >= low) & (place <= high))
    rows, columns = covered
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return images * ~hole
