"""The decoder's discriminator: a frozen DINO reads two images apart, small heads judge what it sees.

Only the heads are trained, so the frozen network is a module of its own: it is in no optimizer, no average and no
checkpoint, and one copy serves the generator's step and the discriminator's.

Source: github:bytetriper/RAE src/disc/dinodisc.py at a4d18c4, which descends from StyleGAN-T (arXiv 2301.09515).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from train.models.compilation import compile_blocks
from train.models.config import IMAGENET_MEAN, IMAGENET_STD

IMAGE_SIZE = 224
"""Side to which every image is resized, 512 pixels too. Source: FrozenDINONoDrop."""

NORM_EPS = 1e-6
"""Added to variances, in DINO and in the heads. Source: as `IMAGE_SIZE`."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Shape of the frozen network; the defaults are the published ViT-S/8."""

    patch_size: int = 8
    """Side of a patch in pixels."""
    width: int = 384
    """Width of the residual stream."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """Attention heads a block."""
    mlp_ratio: float = 4.0
    """MLP width over width."""
    key_depths: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks whose output is judged, counted from 0."""


DINO_SIZES = {
    "S_8": DinoConfig(),
    "S_16": DinoConfig(patch_size=16),
    "B_16": DinoConfig(patch_size=16, width=768, num_heads=12),
}
"""The published sizes by their published names. Source: `recipes` in src/disc/dinodisc.py."""


class DinoFeatures(nn.Module):
    """Frozen DINO: images to one feature map a judged depth."""

    scale: Tensor
    offset: Tensor

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(
            img_size=IMAGE_SIZE,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            # DINO was trained with the exact GELU; the published discriminator was trained with this one.
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        # From [-1, 1] to ImageNet's scale in one step.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("offset", (0.5 - mean) / std, persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def load_dino(self, state: dict[str, Tensor]) -> None:
        """Load a DINO checkpoint's keys, with the keys' bias left out as the published discriminator does.

        Args:
            state: state dict of a DINO ViT in timm's names; every key must be there and no other.
        """
        state = {key: value.clone() for key, value in state.items()}
        for key, value in state.items():
            if key.endswith("attn.qkv.bias"):
                value.view(3, -1)[1] = 0
        self.vit.load_state_dict(state)

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`."""
        compile_blocks(self.vit.blocks, **options)

    def train(self, mode: bool = True) -> DinoFeatures:  # noqa: FBT001, FBT002 - nn.Module's own signature
        """Stay in evaluation mode, whatever happens around it."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return feature maps of images.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            The last block's output, then that of each judged depth: float [B, width, tokens], without class token
            and before the last norm. The last block comes twice where it is itself a judged depth.
        """
        resized = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
        # Where there is a backward pass, to the images, blocks are computed again in it: DINO's activations at 785
        # tokens would be the largest of the whole step.
        self.vit.set_grad_checkpointing(enable=torch.is_grad_enabled())
        last = self.config.depth - 1
        depths = sorted({*self.config.key_depths, last})
        found = self.vit.forward_intermediates(
            resized * self.scale + self.offset,
            indices=depths,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        assert isinstance(found, list)
        maps = {depth: tokens.transpose(1, 2) for depth, tokens in zip(depths, found, strict=True)}
        return [maps[last], *(maps[depth] for depth in sorted(self.config.key_depths))]


class Discriminator(nn.Module):
    """One head a feature map; each gives every token a logit, high for real."""

    def __init__(self, width: int = 384, num_maps: int = 5, kernel_size: int = 9) -> None:
        """Build the heads.

        Args:
            width: channels of a feature map.
            num_maps: feature maps, one more than judged depths.
            kernel_size: tokens a head's middle layer sees at once. Source: configs/stage1/training, `ks: 9`.
        """
        super().__init__()
        self.heads = nn.ModuleList(_head(width, kernel_size) for _ in range(num_maps))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Judge feature maps, each [B, width, tokens]: logits [B, num_maps · tokens].

        In training mode every call takes one step of the spectral norms' power iteration.
        """
        return torch.cat(
            [head(features).flatten(1) for head, features in zip(self.heads, maps, strict=True)], dim=1
        )


class _TokenNorm(nn.InstanceNorm1d):
    """Normalise each channel of each image over its tokens, in float32; named a batch norm in the reference."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class _Residual(nn.Module):
    """(f(x) + x) / √2, which keeps the variance."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.fn(x) + x) / math.sqrt(2)
        return out


def _conv(width: int, out_width: int, kernel_size: int) -> nn.Module:
    conv = nn.Conv1d(width, out_width, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    # The older spectral norm: the published keys are its weight_orig, weight_u and weight_v.
    return spectral_norm(conv, n_power_iterations=1, eps=1e-12, dim=0)


def _stage(width: int, kernel_size: int) -> nn.Module:
    return nn.Sequential(_conv(width, width, kernel_size), _TokenNorm(width), nn.LeakyReLU(0.2))


def _head(width: int, kernel_size: int) -> nn.Module:
    return nn.Sequential(_stage(width, 1), _Residual(_stage(width, kernel_size)), _conv(width, 1, 1))
