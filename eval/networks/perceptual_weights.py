"""LPIPS of pictures: the trainers' perceptual distance, on pictures of 8 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eval.networks.frozen import randomise, seed_of
from train.engine.arithmetic import whole_float32
from train.models.perceptual import Perceptual
from train.tasks import frozen_networks
from train.weights.published import load_exactly


def load_perceptual(weights: str, device: torch.device) -> Perceptual:
    """The perceptual distance, frozen.

    Args:
        weights: `public`, a file with VGG16's weights in torchvision's names, or `random:SEED` for random convolutions;
            the published linear weights in any case.
        device: Where to compute.

    Raises:
        UserError: The weights cannot be had or belong to another network.
    """
    if seed := seed_of(weights):
        network = Perceptual()
        randomise(network, int(seed))
        load_exactly(network, {**network.state_dict(), **frozen_networks.linear_weights()}, weights)
    else:
        network = frozen_networks.load_perceptual(
            None if weights == "public" else Path(weights),
            remedy=f"--lpips-weights FILE ({frozen_networks.VGG16_URL}), or leave out the metric lpips",
        )
    return network.to(device).eval()


@torch.inference_mode()
def lpips(network: Perceptual, a: Tensor, b: Tensor) -> Tensor:
    """Perceptual distance of each pair of pictures, uint8 [B, 3, H, W], as float64 [B]; 0 for equal ones.

    Computed in float32 without TensorFloat-32, whatever the caller's arithmetic is.
    """
    with whole_float32(a.device):
        distances: Tensor = network(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
    return distances.double()
