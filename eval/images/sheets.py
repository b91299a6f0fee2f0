"""From pixels to 8-bit images, labelled grids and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shards import replacing

_GAP = 2
_PAPER = 255
_INK = (20, 20, 20)


def to_uint8(pixels: Tensor, *, rounding: bool = False) -> Tensor:
    """Return 8-bit images of pixels: clamped to [0, 1], times 255, and cut to whole levels.

    Args:
        pixels: float [B, 3, H, W], nominally in [0, 1].
        rounding: Round to the nearest level instead of truncating as the published evaluation does.

    Returns:
        uint8 [B, H, W, 3], on the same device.

    Source: github:bytetriper/RAE at a4d18c4, src/sample_ddp.py (clamp, × 255, cast).
    """
    levels = pixels.float().clamp(0.0, 1.0) * 255.0
    if rounding:
        levels = levels.round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid(images: NDArray[np.uint8], columns: int, row_labels: Sequence[str] = ()) -> Image.Image:
    """Return images side by side in lines, with a name at the left of each line.

    Args:
        images: uint8 [n, H, W, 3].
        columns: Images a line; the last line may be shorter.
        row_labels: A name for each line, or none at all.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    assert len(row_labels) in (0, rows), f"{len(row_labels)} names for {rows} rows"
    font = ImageFont.load_default(size=max(10.0, min(height / 5, 20.0)))
    margin = max((int(font.getlength(name)) + 4 * _GAP for name in row_labels), default=0)
    size = (margin + columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, (_PAPER,) * 3)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (margin + _GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
        sheet.paste(Image.fromarray(image), corner)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_labels):
        middle = _GAP + row * (height + _GAP) + height // 2
        draw.text((2 * _GAP, middle), name, fill=_INK, font=font, anchor="lm")
    return sheet


def side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pairs of images joined along their height, uint8 [n, H, 2W, 3]."""
    return np.concatenate([left, right], axis=2)


def save_png(image: Image.Image | NDArray[np.uint8], path: Path) -> None:
    """Write an image as PNG; the file appears whole or not at all."""
    whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(path) as file:
        whole.save(file, format="PNG")
