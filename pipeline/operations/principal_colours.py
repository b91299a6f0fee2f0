"""Tokens as colours: their first three principal components, one colour a token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def principal_colours(tokens: NDArray[np.floating], grid: tuple[int, int], size: int) -> NDArray[np.uint8]:
    """Show each token by its first three principal components as red, green and blue.

    The components are of all the tokens given, so that equal colours mean similar tokens in every image of one call.

    Args:
        tokens: Raw tokens, float [B, N, D].
        grid: Token rows and columns, with N their product.
        size: Side of each image in pixels.

    Returns:
        Images, uint8 [B, size, size, 3].
    """
    count, num_tokens, width = tokens.shape
    if grid[0] * grid[1] != num_tokens:
        raise ValueError(f"a grid must hold every token, got {grid[0]} x {grid[1]} for {num_tokens} tokens")
    flat = tokens.reshape(-1, width).astype(np.float64)
    flat -= flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    scores = flat @ vectors[:, ::-1][:, :3]
    low, high = np.percentile(scores, [1, 99], axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    images = (colours * 255).astype(np.uint8).reshape(count, *grid, 3)
    rows = np.arange(size) * grid[0] // size
    columns = np.arange(size) * grid[1] // size
    shown: NDArray[np.uint8] = images[:, rows[:, None], columns[None, :]]
    return shown
