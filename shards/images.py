"""From an image file to the pixels that are stored: the only copy of this step.

Choices, where files leave one: the image is turned as its EXIF orientation says; of an animation the first
frame counts; transparency is laid on white; 16-bit samples keep their upper 8 bits; grey, palette and CMYK
become RGB as Pillow converts them; colour profiles are not applied. What cannot be decoded whole is refused,
never repaired.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from shards.draws import integers_below
from shards.errors import UndecodableImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000") + (
    "AVIF",
) * AvifImagePlugin.SUPPORTED
"""Formats that are tried; others of Pillow's start external programs or hold no images."""

# Pillow's own limit on pixels cannot be set for one image; `decode_image` says of large images itself what it must.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

LARGEST_IMAGE = 100_000_000
"""Pixels of the largest image that is decoded unasked: some 0.8 GB for each that is decoded at a time."""

# What Pillow's decoders raise on files that are not what they claim to be.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
"""The chunks of a PNG that decide about its pixels."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns an image upright, by the EXIF tag Orientation."""


def decode_image(content: bytes, *, max_pixels: int = LARGEST_IMAGE) -> Image.Image:
    """Decode an image file to RGB.

    Args:
        content: The file's bytes.
        max_pixels: Refuse an image of more pixels, by its header and before any of it is decoded. Pillow's limit,
            which is one for the whole process, is raised to it where it is lower.

    Returns:
        An image of mode RGB, decoded whole. It stays Pillow's, because copies as arrays cost as much as all other
        work on an image of some megapixels, and let no other thread run meanwhile.

    Raises:
        UndecodableImageError: With the reason, if the bytes are not one whole image of a known format, or it is too
            large. Damage to metadata, which no pixel depends on, does not count.
    """
    if not content:
        raise UndecodableImageError("the file is empty")
    try:
        return _decoded(content, max_pixels)
    except _DECODER_ERRORS as error:
        if content.startswith(_PNG):
            # Pillow refuses a PNG for a damaged or large text, profile or EXIF chunk, too.
            with suppress(*_DECODER_ERRORS):
                return _decoded(_pixel_chunks(content), max_pixels)
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            # Raised above Pillow's limit or twice that, which is no less than `max_pixels` here.
            raise UndecodableImageError(_too_large("its pixels", max_pixels)) from error
        if isinstance(error, UnidentifiedImageError):
            raise UndecodableImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


def _decoded(content: bytes, max_pixels: int) -> Image.Image:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        if opened.width * opened.height > max_pixels:
            raise UndecodableImageError(_too_large(f"{opened.width} × {opened.height} pixels", max_pixels))
        opened.load()
        return _to_rgb(_upright(opened))


def _too_large(pixels: str, max_pixels: int) -> str:
    return f"{pixels} are more than --max-pixels {max_pixels}"


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says; where the metadata cannot be read it says nothing."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except _DECODER_ERRORS:
        return image
    return image if turn is None else image.transpose(turn)


def _pixel_chunks(content: bytes) -> bytes:
    """Return a PNG file without the chunks that its pixels do not depend on."""
    kept, position = [_PNG], len(_PNG)
    while position + 12 <= len(content):
        stop = position + 12 + int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 8] in _PNG_PIXELS:
            kept.append(content[position:stop])
        position = stop
    return b"".join(kept)


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
    resized = _as_pillow(image)
    while min(resized.size) >= 2 * size:
        resized = resized.resize((resized.width // 2, resized.height // 2), Image.Resampling.BOX)
    scale = size / min(resized.size)
    target = (round(resized.width * scale), round(resized.height * scale))
    resized = resized.resize(target, Image.Resampling.BICUBIC)
    return _square(resized, (resized.height - size) // 2, (resized.width - size) // 2, size)


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
    resized = _as_pillow(image)
    width, height = resized.size
    target = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    resized = resized.resize(target, Image.Resampling.BICUBIC)
    limits = (resized.height - size + 1, resized.width - size + 1)
    places = [integers_below(limits, seed=seed, stream=stream) for stream in streams]
    return [_square(resized, top, left, size) for top, left in places]


def _as_pillow(image: NDArray[np.uint8] | Image.Image) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _square(image: Image.Image, top: int, left: int, size: int) -> NDArray[np.uint8]:
    return np.asarray(image.crop((left, top, left + size, top + size))).copy()
