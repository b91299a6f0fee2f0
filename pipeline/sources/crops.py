"""What each view shows the encoder: the centre crop of an image, its mirror image, or a random crop."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from pipeline.settings.config import PIXELS_PER_TOKEN
from shards import (
    LARGEST_IMAGE,
    MIRRORED_VIEWS,
    BadImageError,
    EncoderIdentity,
    Recipe,
    center_crop,
    decode_image,
    random_crops,
)

Images = NDArray[np.uint8]

_LONGEST = 100
"""An image longer than this, in units of its shorter side, would take gigabytes when that side is scaled up."""


def default_crop(encoder: EncoderIdentity) -> int:
    """Return the side of the crop that fits an encoder: what a decoder with patches of 16 pixels gives back."""
    return PIXELS_PER_TOKEN * encoder.grid[0]


class Crops:
    """The crops of a store's views.

    Attributes:
        names: The views with a crop of their own (V of them): all but the mirrored ones.
        size: Side P of a crop in pixels, also where crops are not stored: tokens do not depend on that.

    Args:
        recipe: What is written.
        max_pixels: Larger images are refused.
    """

    def __init__(self, recipe: Recipe, max_pixels: int = LARGEST_IMAGE) -> None:
        self.names = tuple(view for view in recipe.views if view not in MIRRORED_VIEWS)
        self.size = recipe.image_size or default_crop(recipe.encoder)
        self._seed = recipe.seed
        self._max_pixels = max_pixels

    def decode(self, content: bytes) -> Image:
        """Return an image file as a Pillow image of mode RGB.

        Raises:
            UndecodableImageError: If it is not one whole image.
            BadImageError: If it is too long and thin.
        """
        image = decode_image(content, max_pixels=self._max_pixels)
        shorter, longer = sorted(image.size)
        if longer > _LONGEST * shorter:
            raise BadImageError(f"{longer} pixels are more than {_LONGEST} times the other side's {shorter}")
        return image

    def cut(self, image: Image, key: str, views: Collection[str], out: Images) -> None:
        """Cut the crops of some views from a decoded image.

        Args:
            image: The image, of mode RGB.
            key: Its key; with the recipe's seed and the view's name it decides where a random crop lies.
            views: Views that are needed; crops that none of them shows are left as they are.
            out: uint8 [V, P, P, 3], takes the crops.
        """
        needed = {MIRRORED_VIEWS.get(view, view) for view in views}
        if "center" in needed:
            out[self.names.index("center")] = center_crop(image, self.size)
        random = [name for name in self.names if name in needed and name != "center"]
        if random:
            crops = random_crops(image, self.size, [f"{name}/{key}" for name in random], seed=self._seed)
            for name, crop in zip(random, crops, strict=True):
                out[self.names.index(name)] = crop

    def stored(self, crops: Images, view: str) -> Images:
        """Select the crop to store for a view that is not mirrored, from crops uint8 [V, …]."""
        image: Images = crops[self.names.index(view)]
        return image

    def shown(self, crops: Tensor, view: str) -> Tensor:
        """Select what a view shows the encoder, uint8 [b, 3, P, P], from crops [V, b, P, P, 3]."""
        pixels = crops[self.names.index(MIRRORED_VIEWS.get(view, view))].permute(0, 3, 1, 2)
        return pixels.flip(-1) if view in MIRRORED_VIEWS else pixels
