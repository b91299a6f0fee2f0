"""The layout of `diffusers.AutoencoderRAE`: encoder, decoder and latent statistics in one folder.

    config.json                            shapes, pixel and latent statistics
    diffusion_pytorch_model.safetensors    encoder.*, decoder.*, encoder_{mean,std}, _latents_{mean,std}

Written and read without diffusers, whose decoder computes its position table, stretched to a side of 16 whatever the
grid. So only a decoder on a 16×16 grid whose table was never trained is written or read: what diffusers makes of a
512-pixel decoder on 32×32 tokens is not what RAE's own code makes of it.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_rae.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from eval.networks.diffusers_decoder import (
    POSITIONS,
    TABLE_SIDE,
    decoder_from_diffusers,
    decoder_to_diffusers,
    is_computed_table,
)
from eval.networks.diffusers_encoder import read_encoder
from shards import UserError, read_document, replace_atomically
from train.models.config import ViTDecoderConfig
from train.models.normalizer import LatentNormalizer
from train.models.vit_decoder import ViTDecoder
from train.weights.infer import PublishedFileError
from train.weights.published import StateDict, read_state_dict

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
AUTOENCODER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
CLASS_NAME = "AutoencoderRAE"
STD_EPS = 1e-5
"""diffusers adds this to the standard deviation, where RAE adds it to the variance inside the root."""

_BUFFERS = {"encoder_mean", "encoder_std", "_latents_mean", "_latents_std"}
"""Tensors of an autoencoder that belong to neither network."""

_SHAPE = (
    *("encoder_hidden_size", "encoder_input_size", "encoder_patch_size", "patch_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"),
    "decoder_intermediate_size",
)
"""Settings in config.json that a decoder's shape follows from."""


class Autoencoder(NamedTuple):
    """What a folder in this layout holds of ours."""

    decoder: ViTDecoder
    """The decoder, in evaluation mode."""
    normalizer: LatentNormalizer | None
    """Latent statistics, or None where latents are raw tokens."""


def write_autoencoder(
    folder: Path,
    decoder: ViTDecoder,
    encoder_path: Path,
    normalizer: LatentNormalizer | None,
    *,
    input_size: int,
    transformers: Literal[4, 5] = 4,
) -> None:
    """Write a folder that `AutoencoderRAE.from_pretrained` loads.

    Args:
        folder: Folder to write; it is made.
        decoder: The decoder.
        encoder_path: The encoder's weights in transformers' layout (4's names), safetensors or PyTorch's own.
        normalizer: Latent statistics; None for latents that are raw tokens.
        input_size: Side of the encoder's input in pixels.
        transformers: Major version whose names the encoder gets; 5 is known for DINOv2 only.

    Raises:
        UserError: The encoder is of no known kind, does not fit the decoder, or the decoder's position table was
            trained, or it puts out the image itself.
    """
    config = decoder.config
    if config.output == "image":
        raise UserError(
            "diffusers' AutoencoderRAE multiplies by the encoder's pixel std, and this decoder puts out the "
            "image itself; export it in the published layout"
        )
    encoder, shape = read_encoder(encoder_path, transformers)
    side = input_size // shape.patch_size
    if (side, side) != config.grid or shape.width != config.token_width:
        raise UserError(
            f"{encoder_path} gives {side}×{side} tokens of width {shape.width} at {input_size} pixels, the decoder "
            f"reads {config.grid[0]}×{config.grid[1]} of width {config.token_width}: give the encoder it was trained on"
        )

    latents = _latent_statistics(normalizer)
    state = {
        **{f"encoder.{key}": value for key, value in encoder.items()},
        **{f"decoder.{key}": value for key, value in decoder_to_diffusers(decoder).items()},
        "encoder_mean": decoder.pixel_mean,
        "encoder_std": decoder.pixel_std,
        "_latents_mean": torch.zeros(1) if latents is None else latents[0],
        "_latents_std": torch.ones(1) if latents is None else latents[1],
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    replace_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    values = {
        "_class_name": CLASS_NAME,
        "encoder_type": shape.kind,
        "encoder_hidden_size": shape.width,
        "encoder_patch_size": shape.patch_size,
        "encoder_num_hidden_layers": shape.depth,
        "encoder_input_size": input_size,
        "encoder_norm_mean": list(config.pixel_mean),
        "encoder_norm_std": list(config.pixel_std),
        "decoder_hidden_size": config.width,
        "decoder_num_hidden_layers": config.depth,
        "decoder_num_attention_heads": config.num_heads,
        "decoder_intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "image_size": config.image_size[0],
        "num_channels": 3,
        "latents_mean": None if latents is None else latents[0].tolist(),
        "latents_std": None if latents is None else latents[1].tolist(),
        "noise_tau": 0.0,
        "reshape_to_2d": True,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
    }
    replace_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def _latent_statistics(normalizer: LatentNormalizer | None) -> tuple[Tensor, Tensor] | None:
    """Return mean and std such that diffusers' (z − mean) / (std + 1e-5) is our (z − mean) / √(variance + eps)."""
    if normalizer is None:
        return None
    std = normalizer.std - STD_EPS
    return torch.zeros_like(std) if normalizer.mean is None else normalizer.mean, std


def read_autoencoder(folder: Path) -> Autoencoder:
    """Return the decoder and the latent statistics in a folder of this layout.

    Raises:
        PublishedFileError: A file is missing or broken, its keys and shapes do not fit, or diffusers' decoder would
            not compute what RAE's does.
    """
    absent = [name for name in AUTOENCODER_FILES if not (folder / name).is_file()]
    if absent:
        raise PublishedFileError(
            f"a folder in diffusers' layout holds {' and '.join(AUTOENCODER_FILES)}; {folder} lacks "
            f"{' and '.join(absent)}"
        )
    values, state = _read_config(folder / CONFIG_FILE), _read_weights(folder / WEIGHTS_FILE)
    config = _decoder_config(values, state, folder)
    weights = {
        key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")
    }
    _require_own_positions(weights, config, folder)
    decoder = decoder_from_diffusers(weights, config, folder / WEIGHTS_FILE)
    return Autoencoder(decoder, _normalizer(state, (config.token_width, *config.grid), folder))


def _require_own_positions(weights: StateDict, config: ViTDecoderConfig, folder: Path) -> None:
    """Refuse a decoder whose positions diffusers computes otherwise than RAE."""
    rows, columns = config.grid
    stored = weights.get(POSITIONS)
    if rows == columns == TABLE_SIDE and (stored is None or is_computed_table(stored, config)):
        return
    raise PublishedFileError(
        f"diffusers computes every decoder's positions as for {TABLE_SIDE}×{TABLE_SIDE} tokens; {folder} is for "
        f"{rows}×{columns} or holds positions of its own, so RAE's decoder gives other pixels; give RAE's own model.pt"
    )


def _read_config(path: Path) -> dict[str, Any]:
    values = read_document(
        path.read_bytes(), dict[str, Any], name=path, error=PublishedFileError, remedy="download it again"
    )
    found = values.get("_class_name")
    if found != CLASS_NAME:
        raise PublishedFileError(
            f"a folder in diffusers' layout must hold an {CLASS_NAME}; {path} says {found!r}"
        )
    missing = [name for name in _SHAPE if not (isinstance(values.get(name), int) and values[name] > 0)]
    if missing:
        raise PublishedFileError(f"{path} lacks {', '.join(missing)}, which must be whole numbers above 0")
    for name, needed in {"num_channels": 3, "scaling_factor": 1.0}.items():
        if values.get(name, needed) != needed:
            raise PublishedFileError(f"{name} must be {needed}; {path} says {values[name]}")
    return dict(values)


def _read_weights(path: Path) -> StateDict:
    """Return every tensor of the file, of which each has a place in the layout."""
    state = read_state_dict(path)
    missing = sorted(_BUFFERS - state.keys())
    unknown = sorted(key for key in state.keys() - _BUFFERS if not key.startswith(("encoder.", "decoder.")))
    if missing or unknown:
        raise PublishedFileError(
            f"{path} does not fit an {CLASS_NAME}; missing: {', '.join(missing) or 'nothing'}; "
            f"not known: {', '.join(unknown) or 'nothing'}"
        )
    return state


def _decoder_config(values: Mapping[str, Any], state: StateDict, folder: Path) -> ViTDecoderConfig:
    side = values["encoder_input_size"] // values["encoder_patch_size"]
    pixels = values["patch_size"] * side
    if values.get("image_size") not in (None, pixels):
        raise PublishedFileError(
            f"{side}×{side} patches of {values['patch_size']} pixels make images of {pixels}; "
            f"{folder / CONFIG_FILE} says {values['image_size']}"
        )
    # diffusers takes these from the weights, whatever its configuration says.
    (red, green, blue), (red_std, green_std, blue_std) = (
        _rgb(state[name], name, folder) for name in ("encoder_mean", "encoder_std")
    )
    return ViTDecoderConfig(
        token_width=values["encoder_hidden_size"],
        grid=(side, side),
        width=values["decoder_hidden_size"],
        depth=values["decoder_num_hidden_layers"],
        num_heads=values["decoder_num_attention_heads"],
        mlp_width=values["decoder_intermediate_size"],
        patch_size=values["patch_size"],
        pixel_mean=(red, green, blue),
        pixel_std=(red_std, green_std, blue_std),
    )


def _rgb(value: Tensor, name: str, folder: Path) -> list[float]:
    if value.shape != (1, 3, 1, 1):
        raise PublishedFileError(
            f"{name} must be [1, 3, 1, 1]; in {folder / WEIGHTS_FILE} it is {list(value.shape)}"
        )
    # To the digits that were meant: as float32, 0.485 is 0.48500001430511475.
    return [float(f"{channel:.7g}") for channel in value.flatten().tolist()]


def _normalizer(state: StateDict, latent: tuple[int, int, int], folder: Path) -> LatentNormalizer | None:
    """Return our normaliser that computes what diffusers does; None where latents are raw tokens."""
    mean, std = state["_latents_mean"].float(), state["_latents_std"].float()
    if std.shape == mean.shape == (1,) and std.item() == 1 and mean.item() == 0:
        return None
    if std.shape != latent or mean.shape not in (latent, (1,)) or (mean.shape != latent and mean.item() != 0):
        raise PublishedFileError(
            f"latent statistics must be {list(latent)}, or 0 and 1; {folder / WEIGHTS_FILE} holds "
            f"{list(mean.shape)} and {list(std.shape)}"
        )
    own_mean = mean if mean.shape == latent and mean.any() else None
    return LatentNormalizer(own_mean, (std + STD_EPS).square(), eps=0.0)
