"""LPIPS: how different two images look to a VGG16.

Source: arXiv 1801.03924; github:bytetriper/RAE src/disc/lpips.py at a4d18c4, which descends from VQGAN's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

STAGES: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
"""Channels of VGG16's convolutions, stage by stage. Source: arXiv 1409.1556 table 1, column D."""

SHIFT = (-0.030, -0.088, -0.188)
"""Taken from pixels in [-1, 1]. Source: ScalingLayer in src/disc/lpips.py."""

SCALE = (0.458, 0.448, 0.450)
"""Pixels are divided by it then. Source: as `SHIFT`."""

EPS = 1e-10
"""Added to a feature vector's length. Source: `_normalize` in src/disc/lpips.py."""


class Perceptual(nn.Module):
    """LPIPS distance with VGG16, frozen.

    `features.*` are torchvision's names for VGG16's convolutions, `lin*.model.1.weight` the published linear weights'.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps = set[int]()
        channels = 3
        for stage in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.add(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for index, stage in enumerate(STAGES):
            # The published file counts a dropout as layer 0 of each.
            linear = nn.Sequential(nn.Identity(), nn.Conv2d(stage[-1], 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.ModuleDict({"model": linear}))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distance of each pair of images.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            others: as `images`.

        Returns:
            float [B], 0 for equal images.
        """
        weights = [self.get_parameter(f"lin{index}.model.1.weight") for index in range(len(STAGES))]
        maps = zip(self._maps(images), self._maps(others), weights, strict=True)
        # A 1×1 convolution and the mean over places: one weighted sum over channels.
        distances = [
            ((one - other).square().mean(dim=(2, 3)) * weight.view(1, -1)).sum(dim=1)
            for one, other, weight in maps
        ]
        return torch.stack(distances).sum(dim=0)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield feature maps [B, C, h, w] of the five stages, each place's vector of length 1."""
        x = (images - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                # Not the root of the sum of squares, whose gradient is not a number where every channel is 0.
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)
