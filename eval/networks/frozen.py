"""Weights of a frozen network from a file or from a seed, never by running a pickle.

Feature networks take `public` (their published source), a file, or `random:SEED` (for tests).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from shards import UsageError, UserError
from train.weights.published import read_state_dict


def seed_of(weights: str) -> str:
    """The number in `random:SEED`, empty where weights come from elsewhere.

    Raises:
        UsageError: It is no number.
    """
    kind, _, seed = weights.partition(":")
    if kind != "random":
        return ""
    if not seed.isdigit():
        raise UsageError(f"random feature weights need a seed, as in random:0, got {weights}")
    return seed


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors or PyTorch file.

    Raises:
        UsageError: There is no such file.
        UserError: It holds something else.
    """
    if not path.is_file():
        raise UsageError(f"feature weights must be `public`, `random:SEED` or a file, found no file {path}")
    return read_state_dict(path)


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict, every key of it.

    Raises:
        UserError: It belongs to another network; the message names the first difference.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"feature weights in {source} do not fit the network: {first}") from error


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
    """SHA-256 over names and values of a network's weights."""
    state = network.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
