"""The kinds of encoders whose reference differs from timm, and in what."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.models.config import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]
RAEV2 = "raev2"
"""Tag behind a timm name that asks for RAEv2's conventions where they differ from RAE's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a kind of encoder computes beyond its architecture, so that timm gives the reference's numbers."""

    grid: int | None
    """Rows and columns of tokens by default, whatever the patch size and the size in timm's name; None takes timm's
    input size."""
    norm_eps: float | None
    """Epsilon of every LayerNorm; None keeps timm's."""
    final_eps: float | None = None
    """Epsilon of the LayerNorm on the tokens; None takes that of the others."""
    final_affine: bool = False
    """Whether that LayerNorm keeps the weight and bias of the network's own."""
    spatial_mean: bool = False
    """Whether several blocks are combined with the spatial mean of the highest, unless asked otherwise."""
    antialias_positions: bool
    """Whether position embeddings are antialiased when they are resampled to another grid."""
    rotary: bool = False
    """Whether positions are rotary, with periods that weight files may hold."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the timm model that differ from timm's own."""
    mean: Triple | None = None
    """Pixel mean, RGB; None takes timm's."""
    std: Triple | None = None
    """Pixel standard deviation, RGB; None takes timm's."""
    image_patch: int | None = None
    """Pixels of a token's side in the image that is resized first, if there are two resizes."""

    def input_size(self, name: str) -> int | None:
        """Return side in pixels the encoder of this timm name sees by default; None takes timm's."""
        found = re.search(r"_patch(\d+)", name)
        return None if self.grid is None else self.grid * (int(found.group(1)) if found else 16)


# Source: github:bytetriper/RAE at a4d18c4, src/stage1/encoders/{dinov2,mae,siglip2}.py, and the transformers
# 4.56.2 models and image processors they load. timm differs in the LayerNorm eps of MAE (1e-6), in the GELU
# of SigLIP (exact), and in antialiasing the position embeddings of MAE.
# The others are facts about github:nanovisionx/RAEv2 at 8a0d238 and github:facebookresearch/dinov3 at 94a96ac.
FAMILIES = {
    "dinov2": Family(grid=16, norm_eps=1e-6, antialias_positions=True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "mae": Family(grid=16, norm_eps=1e-12, antialias_positions=False, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "siglip": Family(
        grid=16,
        norm_eps=1e-6,
        antialias_positions=False,
        model_args={"act_layer": "gelu_tanh"},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    "dinov3": Family(
        grid=16,
        norm_eps=1e-5,
        spatial_mean=True,
        antialias_positions=True,  # it has none: what stores of earlier versions say
        rotary=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    # The image is resized to 256 pixels, normalised, and resized to 224, both bicubic without antialias; the norm on
    # the tokens has torch's eps, the blocks DINOv2's.
    "raev2 dinov2": Family(
        grid=16,
        norm_eps=1e-6,
        final_eps=1e-5,
        antialias_positions=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_patch=16,
    ),
    # ImageNet's pixel statistics, and the affine of the network's own last norm is kept.
    "raev2 siglip": Family(
        grid=16,
        norm_eps=1e-6,
        final_affine=True,
        spatial_mean=True,
        antialias_positions=False,
        model_args={"act_layer": "gelu_tanh"},
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
}
OTHER = Family(grid=None, norm_eps=None, antialias_positions=True)


def family_of(name: str) -> Family:
    """Return the conventions that an encoder of this timm name follows."""
    architecture, _, tag = name.partition(".")
    prefix = f"{RAEV2} " if tag == RAEV2 else ""
    if "dinov3" in architecture:
        return FAMILIES["dinov3"]
    for kind in ("dinov2", "siglip"):
        if kind in architecture:
            return FAMILIES[prefix + kind]
    if tag == "mae":
        return FAMILIES["mae"]
    return OTHER
