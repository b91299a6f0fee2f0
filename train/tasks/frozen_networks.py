"""Weights of the frozen networks a decoder is judged by: VGG16 for the perceptual distance, DINO for the discriminator.

They come from a file, or from torch's cache of downloads, or are downloaded; when none of that is possible the error
says how to get them and how to train without.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from shards import UsageError
from train.models.discriminator import DINO_SIZES, DinoFeatures
from train.models.perceptual import STAGES, Perceptual
from train.weights.published import load_exactly, read_state_dict

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""VGG16 as torchvision publishes it, IMAGENET1K_V1."""

_DINO = "https://dl.fbaipublicfiles.com/dino"
DINO_URLS = {
    "S_8": f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "S_16": f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "B_16": f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}
"""DINO's networks as their authors publish them (github:facebookresearch/dino README)."""


_TRAIN_WITHOUT = f"--perceptual-weights FILE ({VGG16_URL}), or train without: --perceptual none"


def load_perceptual(path: Path | None, *, remedy: str = _TRAIN_WITHOUT) -> Perceptual:
    """Return the perceptual distance, frozen.

    Args:
        path: VGG16's weights in torchvision's names; None: torch's cache, else a download.
        remedy: what to give where they cannot be downloaded.

    Raises:
        UsageError: the weights cannot be had, or the package with LPIPS' linear weights is missing.
        PublishedFileError: a file cannot be read or does not fit.
    """
    state = _weights(path, VGG16_URL, remedy)
    # What follows the convolutions, VGG16's classifier, plays no part.
    vgg16 = {name: value for name, value in state.items() if name.startswith("features.")}
    network = Perceptual()
    load_exactly(network, {**vgg16, **linear_weights()}, path or VGG16_URL)
    return network.eval()


def load_dino_features(path: Path | None, size: str = "S_8") -> DinoFeatures:
    """Return the frozen DINO a discriminator looks through.

    Args:
        path: its weights in timm's names, which are its authors' as well; None: torch's cache, else a download.
        size: which of the published networks, a name of `DINO_SIZES`.

    Raises:
        UsageError: the weights cannot be had.
        PublishedFileError: the file cannot be read or does not fit.
    """
    url = DINO_URLS[size]
    remedy = f"--discriminator-weights FILE ({url}), or train without: --adversarial False"
    state = _weights(path, url, remedy)
    # The discriminator's published file holds its input's scale as well, which is a constant here.
    state = {name: value for name, value in state.items() if name not in ("x_scale", "x_shift")}
    features = DinoFeatures(DINO_SIZES[size])
    load_exactly(features.vit, state, path or url)
    features.load_dino(state)
    return features


def linear_weights() -> dict[str, Tensor]:
    """LPIPS' linear weights for VGG16 by `Perceptual`'s names; the package lpips carries them.

    Raises:
        UsageError: the package is not installed.
    """
    found = importlib.util.find_spec("lpips")
    if found is None or found.submodule_search_locations is None:
        raise UsageError(
            "LPIPS' linear weights come with the package lpips: pip install lpips, or do without LPIPS"
        )
    state = read_state_dict(Path(found.submodule_search_locations[0]) / "weights/v0.1/vgg.pth")
    return {name: state[name] for name in (f"lin{index}.model.1.weight" for index in range(len(STAGES)))}


def _weights(path: Path | None, url: str, remedy: str) -> dict[str, Tensor]:
    if path is not None:
        return read_state_dict(path)
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise UsageError(f"{url} cannot be downloaded ({error}); give {remedy}") from error
    return state
