"""LPIPS for evaluation: the published distance with its published weights.

Source: arXiv 1801.03924; the linear weights lie in the `lpips` package, version 0.1, the convolutions are
torchvision's VGG16.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from eval.weight_sources import load_weights, randomise, read_state, seed_of
from shards.errors import UserError
from train.models.perceptual import Perceptual


def load_perceptual(weights: str, device: torch.device) -> Perceptual:
    """The perceptual distance, frozen.

    Args:
        weights: `public`, a file with the state of `train.models.perceptual.Perceptual`, or `random:SEED` for
            random convolutions under the published linear weights.
        device: Where to compute.

    Raises:
        UserError: The weights cannot be had or belong to another network.
    """
    network = Perceptual()
    if seed := seed_of(weights):
        randomise(network, int(seed))
        load_weights(network, {**network.state_dict(), **linear_state()}, weights)
    else:
        state = _public_state() if weights == "public" else read_state(Path(weights))
        load_weights(network, state, weights)
    return network.to(device).eval()


@torch.inference_mode()
def lpips(network: Perceptual, a: Tensor, b: Tensor) -> Tensor:
    """Perceptual distance of each pair of pictures, uint8 [B, 3, H, W], as float64 [B]; 0 for equal ones."""
    distances: Tensor = network(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
    return distances.double()


def _public_state() -> dict[str, Tensor]:
    try:
        from torchvision.models import VGG16_Weights

        backbone = VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except OSError as error:
        raise UserError(
            f"the VGG16 weights of LPIPS could not be fetched ({error}); give --lpips-weights FILE"
        ) from error
    state = {name: value for name, value in backbone.items() if name.startswith("features.")}
    return {**state, **linear_state()}


def linear_state() -> dict[str, Tensor]:
    """The learned weights of the five feature maps, by the names `Perceptual` uses.

    Raises:
        UserError: The lpips package is not installed.
    """
    try:
        resource = files("lpips") / "weights" / "v0.1" / "vgg.pth"
    except ModuleNotFoundError as error:
        raise UserError("LPIPS needs the lpips package; run `pip install -e '.[metrics]'`") from error
    with as_file(resource) as path:
        return read_state(path)
