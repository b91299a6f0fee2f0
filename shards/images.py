"""From an image file to the pixels that are stored: the only copy of this step.

Choices, where files leave one: the picture is turned as its EXIF orientation says; of an animation the first
frame counts; transparency is laid on white; 16-bit samples keep their upper 8 bits; grey, palette and CMYK
become RGB as Pillow converts them; colour profiles are not applied. What cannot be decoded whole is refused,
never repaired.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.draws import integers_below
from shards.errors import UndecodableImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that are tried; others of Pillow's start external programs or are not for pictures."""

# What Pillow's decoders raise on files that are not what they claim to be.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode_image(content: bytes) -> Image.Image:
    """Decode an image file to RGB.

    Args:
        content: The file's bytes.

    Returns:
        A picture of mode RGB, decoded whole. It stays Pillow's, because copies as arrays cost as much as all other
        work on a picture of some megapixels, and let no other thread run meanwhile.

    Raises:
        UndecodableImageError: With the reason, if the bytes are not one whole image of a known format.
    """
    if not content:
        raise UndecodableImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened)
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except _DECODER_ERRORS as error:
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.int64)
        if samples.size and not 0 <= samples.min() <= samples.max() <= 0xFFFF:
            raise ValueError("integer samples beyond 16 bits have no defined white")
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: NDArray[np.uint8] | Image.Image, size: int) -> NDArray[np.uint8]:
    """Scale an image's shorter side to ``size`` and cut the middle square.

    The image is halved by box averages while its shorter side is at least twice ``size``, then resized
    bicubically.

    Args:
        image: uint8[H, W, 3], or a Pillow image of mode RGB.
        size: Side of the square in pixels.

    Returns:
        uint8[size, size, 3].

    Source: ``center_crop_arr`` of ADM, https://github.com/openai/guided-diffusion (image_datasets.py), as
    used by github:bytetriper/RAE at a4d18c4.
    """
    picture = _picture(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    target = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(target, Image.Resampling.BICUBIC)
    return _square(picture, (picture.height - size) // 2, (picture.width - size) // 2, size)


def random_crops(
    image: NDArray[np.uint8] | Image.Image, size: int, streams: Sequence[str], *, seed: int
) -> list[NDArray[np.uint8]]:
    """Scale an image's shorter side to 1.5 · ``size`` and cut a square at random, once for each stream.

    The places depend on nothing but ``seed`` and the streams' names (`shards.draws.integers_below`, first the upper
    edge, then the left one), so that any worker on any machine cuts the same squares.

    Args:
        image: uint8[H, W, 3], or a Pillow image of mode RGB.
        size: Side of the squares in pixels.
        streams: Name of each draw.
        seed: Of all draws.

    Returns:
        For each stream uint8[size, size, 3].

    Source: the training transform of ``src/train_stage1.py``, github:bytetriper/RAE at a4d18c4: torchvision's Resize
    (bicubic, the longer side rounded down) to 384 pixels for images of 256, else 1.5 · size, and RandomCrop; no
    mirror images.
    """
    shorter = 3 * size // 2
    picture = _picture(image)
    width, height = picture.size
    target = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    picture = picture.resize(target, Image.Resampling.BICUBIC)
    limits = (picture.height - size + 1, picture.width - size + 1)
    places = [integers_below(limits, seed=seed, stream=stream) for stream in streams]
    return [_square(picture, top, left, size) for top, left in places]


def _picture(image: NDArray[np.uint8] | Image.Image) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _square(picture: Image.Image, top: int, left: int, size: int) -> NDArray[np.uint8]:
    return np.asarray(picture.crop((left, top, left + size, top + size))).copy()
