"""Weights of the frozen networks a decoder is judged by: VGG16 for the perceptual distance, DINO for the discriminator.

They come from a file, or from torch's cache of downloads, or are downloaded; when none of that is possible the error
says how to get them and how to train without.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor

from shards.errors import UsageError, UserError
from train.models.discriminator import DINO_SIZES, DinoFeatures
from train.models.perceptual import STAGES, Perceptual

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""VGG16 as torchvision publishes it, IMAGENET1K_V1."""

_DINO = "https://dl.fbaipublicfiles.com/dino"
DINO_URLS = {
    "S_8": f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "S_16": f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "B_16": f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}
"""DINO's networks as their authors publish them (github:facebookresearch/dino README)."""


def load_perceptual(path: Path | None) -> Perceptual:
    """The perceptual distance, frozen.

    Args:
        path: VGG16's weights in torchvision's names; None: torch's cache, else a download.

    Raises:
        UsageError: the weights cannot be had, or the package with LPIPS' linear weights is missing.
        UserError: a file does not fit.
    """
    remedy = f"--perceptual-weights FILE ({VGG16_URL}), or train without: --perceptual none"
    vgg = {
        name: value
        for name, value in _weights(path, VGG16_URL, remedy).items()
        if name.startswith("features.")
    }
    network = Perceptual()
    _load(network, {**vgg, **_linear_weights()}, path or VGG16_URL)
    return network.eval()


def load_features(size: Literal["S_8", "S_16", "B_16"], path: Path | None) -> DinoFeatures:
    """The frozen DINO a discriminator looks through.

    Args:
        size: which of the published networks.
        path: its weights; None: torch's cache, else a download.

    Raises:
        UsageError: the weights cannot be had.
        UserError: the file does not fit.
    """
    remedy = f"--discriminator-weights FILE ({DINO_URLS[size]}), or train without: --adversarial False"
    state = _weights(path, DINO_URLS[size], remedy)
    features = DinoFeatures(DINO_SIZES[size])
    try:
        features.load_dino(state)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{path or DINO_URLS[size]} is not DINO {size}: {str(error).splitlines()[0]}"
        ) from error
    return features


def _linear_weights() -> dict[str, Tensor]:
    """LPIPS' linear weights for VGG16, which the package lpips carries."""
    found = importlib.util.find_spec("lpips")
    if found is None or found.submodule_search_locations is None:
        raise UsageError(
            "LPIPS' linear weights come with the package lpips: pip install lpips, or train without: --perceptual none"
        )
    file = Path(found.submodule_search_locations[0]) / "weights/v0.1/vgg.pth"
    return {f"lin{i}.model.1.weight": _read(file)[f"lin{i}.model.1.weight"] for i in range(len(STAGES))}


def _weights(path: Path | None, url: str, remedy: str) -> dict[str, Tensor]:
    if path is not None:
        return _read(path)
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise UsageError(f"{url} cannot be downloaded ({error}); give {remedy}") from error
    return state


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
    return state


def _load(network: torch.nn.Module, state: dict[str, Tensor], source: object) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source} does not fit: {str(error).splitlines()[-1].strip()}") from error
