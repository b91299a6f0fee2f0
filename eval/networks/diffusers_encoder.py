"""An encoder's weights in transformers' layout, as diffusers keeps them: without its last norm, which RAE leaves out.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_rae.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from eval.networks.diffusers_decoder import renamed
from shards import UserError
from train.weights.published import StateDict, read_state_dict

_TRANSFORMERS_5 = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names in a layer of DINOv2: transformers 4 → transformers 5."""


class EncoderShape(NamedTuple):
    """What an encoder's keys and shapes say."""

    kind: Literal["dinov2", "siglip2", "mae"]
    width: int
    patch_size: int
    depth: int


def read_encoder(path: Path, transformers: Literal[4, 5]) -> tuple[StateDict, EncoderShape]:
    """Return an encoder's weights without its last norm's, and its shape.

    Args:
        path: Weights in transformers' layout (4's names), safetensors or PyTorch's own.
        transformers: Major version whose names they get; 5 is known for DINOv2 only.

    Raises:
        UserError: They are of no known kind, or have no names in the version.
    """
    encoder = _without_final_affine(read_state_dict(path))
    shape = _encoder_shape(encoder, path)
    if transformers == 5:
        if shape.kind != "dinov2":
            raise UserError(f"the names of transformers 5 are known for DINOv2 only, {path} is {shape.kind}")
        encoder = {renamed(key, _TRANSFORMERS_5): value for key, value in encoder.items()}
    return encoder, shape


def _without_final_affine(state: StateDict) -> StateDict:
    """Return an encoder's own weights without its last norm's.

    Whole checkpoints are taken too: ViT-MAE's with its decoder, SigLIP2's with its text tower.
    """
    if any(key.startswith("vision_model.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    found = {
        key.removeprefix("vit."): value for key, value in state.items() if not key.startswith("decoder.")
    }
    last_norms = ("layernorm.", "vision_model.post_layernorm.")
    return {key: value for key, value in found.items() if not key.startswith(last_norms)}


def _encoder_shape(state: Mapping[str, Tensor], source: object) -> EncoderShape:
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
    return EncoderShape(kind, width, patch_size, depth)
