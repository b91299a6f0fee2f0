"""The demo page's images: samples beside their photographs, tokens as colours, loss curves."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between images
NAME_WIDTH = 104  # pixels for a class name at the left of its row


def tile(images: NDArray[np.uint8]) -> Image.Image:
    """Lay images out in rows.

    Args:
        images: uint8 [rows, columns, H, W, 3].
    """
    rows, columns, height, width, _ = images.shape
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for row in range(rows):
        for column in range(columns):
            sheet.paste(Image.fromarray(images[row, column]), (column * (width + GAP), row * (height + GAP)))
    return sheet


def class_rows(names: list[str], photographs: NDArray[np.uint8], samples: NDArray[np.uint8]) -> Image.Image:
    """Return one row a class: its name, its photograph, then generated samples.

    Args:
        names: C class names.
        photographs: uint8 [C, H, W, 3].
        samples: uint8 [C, K, H, W, 3].
    """
    height, width = photographs.shape[1:3]
    rows = tile(np.concatenate([photographs[:, None], samples], axis=1))
    sheet = Image.new("RGB", (NAME_WIDTH + rows.width + 3 * GAP, rows.height), "white")
    # The photograph stands apart from the samples: everything right of it is generated.
    sheet.paste(rows.crop((0, 0, width, rows.height)), (NAME_WIDTH, 0))
    sheet.paste(rows.crop((width, 0, rows.width, rows.height)), (NAME_WIDTH + width + 3 * GAP, 0))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=16)
    for row, name in enumerate(names):
        middle = row * (height + GAP) + height // 2
        draw.text((NAME_WIDTH - 8, middle), name, fill="black", font=font, anchor="rm")
    return sheet


def loss_curves(curves: dict[str, tuple[list[int], list[float]]]) -> Image.Image:
    """Return losses over optimizer steps, one panel a training.

    Args:
        curves: Title -> steps and losses.
    """
    figure = Figure(figsize=(5.2 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, (steps, losses)) in zip(panels, curves.items(), strict=True):
        panel.plot(steps, losses, color="#1f4e79", linewidth=1.6)
        panel.set(title=title, xlabel="optimizer step", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG and return its path."""
    image.save(path, optimize=True)
    return path
