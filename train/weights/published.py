"""Read and write the files in which RAE's weights are published.

- `stage2_model.pt`: a DiT-DH or DiT, bare or under `ema`; `load_dit` and `save_state_dict`.
- RAEv2's `checkpoint.pt`: its transformer, bare or under `ema`; `load_dit` and `save_state_dict`.
- `model.pt` of a decoder: a ViT decoder, bare or under `ema`, there also as `decoder.*`; `load_decoder` and
  `save_state_dict`.
- `stat.pt`: {mean, var} of the latent, where the mean may be absent; `load_statistics` and `save_statistics`.

None of these files says what network it belongs to, so its configuration is read from its keys and shapes. Keys that
are missing, unknown or of another shape are listed in one error. Nothing in a file can run code.

Source: github:bytetriper/RAE src/utils/model_utils.py, src/stage1/rae.py, src/extract_decoder.py at a4d18c4;
github:nanovisionx/RAEv2 src/offline_eval.py at 8a0d238.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shards import read_statistics_file, replacing
from train.models.build import Generator, build_model
from train.models.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GeneratorConfig,
    ViTDecoderConfig,
)
from train.models.normalizer import LatentNormalizer
from train.models.vit_decoder import ViTDecoder
from train.weights.infer import PublishedFileError, infer_decoder_config, infer_dit_config
from train.weights.tensor_files import save_tensors

StateDict = dict[str, Tensor]

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""A class or function that a pickle names, in PyTorch's refusal of it."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every key."""


def load_dit(
    path: Path, config: GeneratorConfig | None = None, *, base_depth: int | None = None
) -> Generator:
    """Return a diffusion transformer from a published file, in evaluation mode.

    RAEv2's weights are published under CC BY-NC 4.0, which forbids commercial use; RAE's under MIT.

    Args:
        path: RAE's `stage2_model.pt`, RAEv2's `checkpoint.pt`, or a file of the same keys as .safetensors.
        config: what the network must be; by default read from the file.
        base_depth: of a transformer of RAEv2, deep blocks after which the base output is read; None: as published.

    Raises:
        PublishedFileError: the file cannot be read or does not fit.
        UsageError: there is a base output and nothing says where it is read.
    """
    state = read_state_dict(path)
    model = build_model(config or infer_dit_config(state, path, base_depth))
    load_exactly(model, state, path)
    return model.eval()


def load_decoder(
    path: Path,
    config: ViTDecoderConfig | None = None,
    *,
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN,
    pixel_std: tuple[float, float, float] = IMAGENET_STD,
) -> ViTDecoder:
    """Return a ViT decoder from a published file, in evaluation mode.

    Args:
        path: decoder `model.pt`, a training checkpoint with `decoder.*` keys, or .safetensors of the same keys.
        config: what the network must be; by default read from the file, for the published widths.
        pixel_mean: mean of the encoder's pixels, which no published file holds; not used when `config` is given.
        pixel_std: their standard deviation; SigLIP2's mean and standard deviation are both 0.5.

    Raises:
        PublishedFileError: the file cannot be read or does not fit.
    """
    state = read_state_dict(path)
    inside = {
        key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")
    }
    state = inside or state
    if config is None:
        config = infer_decoder_config(state, path, pixel_mean=pixel_mean, pixel_std=pixel_std)
    # Old files lack this key, which starts as 0; the reference accepts that.
    state.setdefault("trainable_cls_token", torch.zeros(1, 1, config.width))
    model = build_model(config)
    load_exactly(model, state, path)
    return model.eval()


def load_statistics(path: Path) -> LatentNormalizer:
    """Return latent statistics from a published `stat.pt`, or a file of the same names as .npz or .safetensors.

    Raises:
        UsageError: the file cannot be read or holds something else.
    """
    found = read_statistics_file(path)
    mean = None if found.mean is None else torch.tensor(found.mean)
    return LatentNormalizer(mean, torch.tensor(found.variance))


def save_statistics(normalizer: LatentNormalizer, path: Path) -> None:
    """Write latent statistics as a published `stat.pt`; an absent mean is written as None."""
    with replacing(path) as file:
        torch.save({"mean": normalizer.mean, "var": normalizer.variance}, file)


def save_state_dict(model: nn.Module, path: Path) -> None:
    """Write a model's weights in the published layout: a bare state dict, .safetensors or else PyTorch's own."""
    if path.suffix == ".safetensors":
        save_tensors(path, model.state_dict())
        return
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(path) as file:
        torch.save(state, file)


def read_state_dict(path: Path) -> StateDict:
    """Return the weights in a file: bare, or its section `ema`, without the prefixes of wrappers.

    Raises:
        PublishedFileError: the file cannot be read, or holds neither.
    """
    values = _read(path)
    if isinstance(values.get("ema"), Mapping):
        values = dict(values["ema"])
    elif any(isinstance(value, Mapping) for value in values.values()):
        raise PublishedFileError(
            f"weights must be a bare state dict or under 'ema'; {path} has the sections {sorted(values)}"
        )
    others = sorted(key for key, value in values.items() if not isinstance(value, Tensor))
    if others or not values:
        raise PublishedFileError(
            f"a state dict holds tensors only; {path} holds {_listed(others) or 'nothing'}"
        )
    return {_unwrapped(key): value for key, value in values.items()}


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load weights where every key and shape must agree; on failure the model is left as it was.

    Raises:
        PublishedFileError: as `require_same_shapes`.
    """
    require_same_shapes(model, state, source)
    model.load_state_dict(dict(state))


def require_same_shapes(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that are not exactly a model's.

    Args:
        model: the model, which may be on the meta device.
        state: the weights.
        source: what to call them in an error.

    Raises:
        PublishedFileError: keys are missing, unknown or of another shape, each of them named.
    """
    found = differences(model, state)
    if found:
        raise PublishedFileError(f"{source} does not fit a {type(model).__name__}; {found}")


def differences(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """List the keys in which weights differ from a model's own; empty if keys and shapes are the same."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    misshapen = [
        f"{key} is {list(state[key].shape)}, must be {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    kinds = (("missing", missing), ("not known", extra), ("of another shape", misshapen))
    return "; ".join(f"{name}: {_listed(keys)}" for name, keys in kinds if keys)


def _read(path: Path) -> dict[str, Any]:
    """Read a file of ours (.safetensors) or of PyTorch's, without running anything in it."""
    if path.is_dir():
        raise PublishedFileError(
            f"weights are a file, {path} is a folder; of a run give RUN/snapshots/latest.safetensors"
        )
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise PublishedFileError(f"weights are a file, {path} is a pipe or a device")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PublishedFileError(f"there is no file {path}: give the path of a published file") from error
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file without this safety.
        named = _GLOBAL.search(str(error))
        what = f"{named[1]}, which is no tensor" if named else "more than tensors"
        raise PublishedFileError(f"{path} holds {what}; a file of weights alone is read") from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PublishedFileError(f"{path} cannot be read as weights only: {reason}") from error
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise PublishedFileError(
            f"{path} must hold a dictionary with names; it holds a {type(values).__name__}"
        )
    return dict(values)


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPERS):
        for wrapper in WRAPPERS:
            key = key.removeprefix(wrapper)
    return key


def _listed(names: Sequence[str], most: int = 20) -> str:
    """Return names with commas between, the first few where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
