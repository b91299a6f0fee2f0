"""The kinds of encoders whose reference differs from timm, and in what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a kind of encoder computes beyond its architecture, so that timm gives the reference's numbers."""

    input_size: int | None
    """Side in pixels the encoder sees by default; None takes timm's."""
    norm_eps: float | None
    """Epsilon of every LayerNorm; None keeps timm's."""
    antialias_positions: bool
    """Whether position embeddings are antialiased when they are resampled to another grid."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the timm model that differ from timm's own."""
    mean: Triple | None = None
    """Pixel mean, RGB; None takes timm's."""
    std: Triple | None = None
    """Pixel standard deviation, RGB; None takes timm's."""


# Source: github:bytetriper/RAE at a4d18c4, src/stage1/encoders/{dinov2,mae,siglip2}.py, and the transformers
# 4.56.2 models and image processors they load. timm differs in the LayerNorm eps of MAE (1e-6), in the GELU
# of SigLIP (exact), and in antialiasing the position embeddings of MAE.
FAMILIES = {
    "dinov2": Family(
        input_size=224, norm_eps=1e-6, antialias_positions=True, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "mae": Family(
        input_size=256, norm_eps=1e-12, antialias_positions=False, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "siglip": Family(
        input_size=256,
        norm_eps=1e-6,
        antialias_positions=False,
        model_args={"act_layer": "gelu_tanh"},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}
OTHER = Family(input_size=None, norm_eps=None, antialias_positions=True)


def family_of(name: str) -> Family:
    """The conventions that an encoder of this timm name follows."""
    architecture, _, tag = name.partition(".")
    if "dinov2" in architecture:
        return FAMILIES["dinov2"]
    if "siglip" in architecture:
        return FAMILIES["siglip"]
    if tag == "mae":
        return FAMILIES["mae"]
    return OTHER
