"""The layout of `diffusers.AutoencoderRAE`: encoder, decoder and latent statistics in one folder.

    config.json                            shapes, pixel and latent statistics
    diffusion_pytorch_model.safetensors    encoder.*, decoder.*, encoder_{mean,std}, _latents_{mean,std}

Written and read without diffusers. Two things differ from the published layout. The decoder's attention has other
names. And its position table is not stored but computed, stretched to a side of 16 whatever the grid; so only a
decoder on a 16×16 grid whose table was never trained can be written, and what diffusers makes of a 512-pixel decoder
on 32×32 tokens is not what RAE's own code makes of it.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_rae.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.errors import UserError
from train.models.build import build_model
from train.models.config import IMAGENET_MEAN, IMAGENET_STD, ViTDecoderConfig
from train.models.embeddings import sincos_table
from train.models.infer import PublishedFileError
from train.models.normalizer import LatentNormalizer
from train.models.vit_decoder import ViTDecoder
from train.published import StateDict, load_exactly, read_state_dict

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
STD_EPS = 1e-5
"""diffusers adds this to the deviation, where RAE adds it to the variance inside the root."""

TABLE_SIDE = 16
"""diffusers stretches position tables to this side (`base_size` of its get_2d_sincos_pos_embed)."""

_POSITIONS = "decoder_pos_embed"
_ATTENTION = {
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out.0",
}
"""Names in a decoder layer: published → diffusers."""

_TRANSFORMERS_5 = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names in a layer of DINOv2: transformers 4 → transformers 5."""


class Autoencoder(NamedTuple):
    """What a folder in this layout holds of ours."""

    decoder: ViTDecoder
    """The decoder, in evaluation mode."""
    normalizer: LatentNormalizer | None
    """Latent statistics, or None where latents are raw tokens."""


class _EncoderShape(NamedTuple):
    kind: Literal["dinov2", "siglip2", "mae"]
    width: int
    patch_size: int
    depth: int


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
        folder: where to; made if need be.
        decoder: the decoder.
        encoder_path: the encoder's weights in transformers' layout (4's names), safetensors or PyTorch's own.
        normalizer: latent statistics; None for latents that are raw tokens.
        input_size: side of the encoder's input in pixels.
        transformers: major version whose names the encoder gets; 5 is known for DINOv2 only.

    Raises:
        UserError: the encoder is of no known kind, does not fit the decoder, or the decoder's position
        table was
            trained.
    """
    config = decoder.config
    encoder = _without_final_affine(read_state_dict(encoder_path))
    shape = _encoder_shape(encoder, encoder_path)
    side = input_size // shape.patch_size
    if (side, side) != config.grid or shape.width != config.token_width:
        raise UserError(
            f"{encoder_path} gives {side}×{side} tokens of width {shape.width} at {input_size} pixels, the decoder "
            f"reads {config.grid[0]}×{config.grid[1]} of width {config.token_width}: give the encoder it was trained on"
        )
    if transformers == 5:
        if shape.kind != "dinov2":
            raise UserError(
                f"the names of transformers 5 are known for DINOv2 only, {encoder_path} is {shape.kind}"
            )
        encoder = {_renamed(key, _TRANSFORMERS_5): value for key, value in encoder.items()}

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
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    values = {
        "_class_name": "AutoencoderRAE",
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
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def read_autoencoder(folder: Path) -> Autoencoder:
    """The decoder and the latent statistics in a folder of this layout.

    Raises:
        PublishedFileError: a file is missing, or its keys and shapes do not fit.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file() or not (folder / CONFIG_FILE).is_file():
        raise PublishedFileError(
            f"diffusers' layout needs {CONFIG_FILE} and {WEIGHTS_FILE}; {folder} lacks one of them"
        )
    values = json.loads((folder / CONFIG_FILE).read_text())
    state = load_file(path)
    decoder = decoder_from_diffusers(
        {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")},
        _decoder_config(values),
        path,
    )
    if values.get("scaling_factor", 1.0) != 1.0:
        raise PublishedFileError(
            f"latents scaled by another factor than 1 are not supported; {folder} says {values}"
        )
    std, mean = state["_latents_std"], state["_latents_mean"]
    if std.ndim != 3:
        return Autoencoder(decoder, None)
    mean_or_none = mean if mean.shape == std.shape and mean.any() else None
    return Autoencoder(decoder, LatentNormalizer(mean_or_none, (std + STD_EPS).square(), eps=0.0))


def decoder_to_diffusers(decoder: ViTDecoder) -> StateDict:
    """A decoder's weights under diffusers' names.

    Raises:
        UserError: diffusers would compute another position table than the decoder has.
    """
    state = decoder.state_dict()
    if not torch.allclose(state[_POSITIONS].cpu(), _position_table(decoder.config), rtol=0, atol=1e-5):
        rows, columns = decoder.config.grid
        raise UserError(
            f"diffusers computes the decoder's position table, for a {TABLE_SIDE}×{TABLE_SIDE} grid, and cannot "
            f"hold this one, which is for {rows}×{columns} or was trained: export as published instead"
        )
    return {_renamed(key, _ATTENTION): value for key, value in state.items() if key != _POSITIONS}


def decoder_from_diffusers(
    state: Mapping[str, Tensor], config: ViTDecoderConfig, source: object
) -> ViTDecoder:
    """A decoder from weights under diffusers' names, in evaluation mode.

    Raises:
        PublishedFileError: keys are missing, too many or of another shape.
    """
    model = build_model(config)
    names = {theirs: ours for ours, theirs in _ATTENTION.items()}
    renamed = {_renamed(key, names): value for key, value in state.items()}
    # A converted file may still hold RAE's own table; diffusers then ignores it, and here it is used.
    renamed.setdefault(_POSITIONS, _position_table(config))
    load_exactly(model, renamed, source)
    return model.eval()


def _position_table(config: ViTDecoderConfig) -> Tensor:
    """The table diffusers computes, with the extra token's row of zeros: [1, 1 + N, width]."""
    return F.pad(sincos_table(config.width, config.grid, TABLE_SIDE / config.grid[0]), (0, 0, 1, 0))


def _decoder_config(values: Mapping[str, Any]) -> ViTDecoderConfig:
    side = values["encoder_input_size"] // values["encoder_patch_size"]
    red, green, blue = values.get("encoder_norm_mean") or IMAGENET_MEAN
    red_std, green_std, blue_std = values.get("encoder_norm_std") or IMAGENET_STD
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


def _latent_statistics(normalizer: LatentNormalizer | None) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation such that diffusers' (z − mean) / (std + 1e-5) is our (z − mean) / √(variance + eps)."""
    if normalizer is None:
        return None
    std = normalizer.deviation - STD_EPS
    return torch.zeros_like(std) if normalizer.mean is None else normalizer.mean, std


def _without_final_affine(state: StateDict) -> StateDict:
    """An encoder's own weights without its last norm's, which RAE leaves out.

    Whole checkpoints are taken too: ViT-MAE's with its decoder, SigLIP2's with its text tower.
    """
    if any(key.startswith("vision_model.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    found = {
        key.removeprefix("vit."): value for key, value in state.items() if not key.startswith("decoder.")
    }
    last_norms = ("layernorm.", "vision_model.post_layernorm.")
    return {key: value for key, value in found.items() if not key.startswith(last_norms)}


def _encoder_shape(state: Mapping[str, Tensor], source: object) -> _EncoderShape:
    kind: Literal["dinov2", "siglip2", "mae"]
    if "embeddings.register_tokens" in state:
        kind, patches, layer = (
            "dinov2",
            "embeddings.patch_embeddings.projection.weight",
            r"encoder\.layer\.(\d+)\.",
        )
    elif "vision_model.embeddings.patch_embedding.weight" in state:
        kind, patches = "siglip2", "vision_model.embeddings.patch_embedding.weight"
        layer = r"vision_model\.encoder\.layers\.(\d+)\."
    elif "embeddings.cls_token" in state:
        kind, patches, layer = (
            "mae",
            "embeddings.patch_embeddings.projection.weight",
            r"encoder\.layer\.(\d+)\.",
        )
    else:
        raise UserError(
            "an encoder's weights must be DINOv2's with registers, SigLIP2's or MAE's in transformers' layout; "
            f"{source} holds something else"
        )
    width, _, patch_size, _ = state[patches].shape
    depth = len({match[1] for key in state if (match := re.match(layer, key))})
    return _EncoderShape(kind, width, patch_size, depth)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """A key with the part that one of `names` gives another name renamed, between dots only."""
    for old, new in names.items():
        if f".{old}." in key:
            return key.replace(f".{old}.", f".{new}.")
    return key
