"""Weights of the frozen networks behind the metrics, never read by running a pickle.

An option for weights takes `public` (where their authors publish them), a file, or `random:SEED` (for tests).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from shards import UsageError
from train.models.perceptual import Perceptual
from train.tasks import frozen_networks
from train.weights.published import load_exactly, read_state_dict


def seed_of(weights: str) -> int | None:
    """Return the number in `random:SEED`; None where weights come from elsewhere.

    Raises:
        UsageError: It is no number.
    """
    kind, _, seed = weights.partition(":")
    if kind != "random":
        return None
    if not seed.isdigit():
        raise UsageError(f"random feature weights need a seed, as in random:0, got {weights}")
    return int(seed)


def state_in_file(weights: str) -> dict[str, Tensor]:
    """Return a state dict from a safetensors or PyTorch file.

    Raises:
        UsageError: There is no such file.
        PublishedFileError: It holds something else.
    """
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"feature weights must be `public`, `random:SEED` or a file, found no file {path}")
    return read_state_dict(path)


def randomise(network: nn.Module, seed: int) -> None:
    """Draw every matrix and kernel so that activations keep their size through the layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 over names and values of a network's weights."""
    state = network.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_perceptual(weights: str, device: torch.device) -> Perceptual:
    """LPIPS, the trainers' perceptual distance, frozen.

    Args:
        weights: `public`, a file with VGG16's weights in torchvision's names, or `random:SEED` for random convolutions;
            the published linear weights in any case.
        device: Where to compute.

    Raises:
        UserError: The weights cannot be had or belong to another network.
    """
    seed = seed_of(weights)
    if seed is not None:
        network = Perceptual()
        randomise(network, seed)
        load_exactly(network, {**network.state_dict(), **frozen_networks.linear_weights()}, weights)
    else:
        network = frozen_networks.load_perceptual(
            None if weights == "public" else Path(weights),
            remedy=f"--perceptual-weights FILE ({frozen_networks.VGG16_URL}), or leave out the metric lpips",
        )
    return network.to(device).eval()
