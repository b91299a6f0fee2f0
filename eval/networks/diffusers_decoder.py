"""A decoder's weights under the names diffusers gives them, and the position table it computes.

Two things differ from RAE's own layout. The attention has other names. And the position table is not stored but
computed, stretched to a side of 16 whatever the grid: on a 16×16 grid it is RAE's, on another it is not.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_rae.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shards import UserError
from train.models.build import build_model
from train.models.config import ViTDecoderConfig
from train.models.embeddings import sincos_table
from train.models.vit_decoder import ViTDecoder
from train.weights.published import StateDict, load_exactly

TABLE_SIDE = 16
"""diffusers stretches position tables to this side (`base_size` of its get_2d_sincos_pos_embed)."""

POSITIONS = "decoder_pos_embed"
"""RAE's name of the position table; diffusers stores none, but a converted file may still hold it."""

_ATTENTION = {
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out.0",
}
"""Names in a decoder layer: published → diffusers."""


def decoder_to_diffusers(decoder: ViTDecoder) -> StateDict:
    """Return a decoder's weights under diffusers' names.

    Raises:
        UserError: diffusers would compute another position table than the decoder has.
    """
    state = decoder.state_dict()
    if not is_computed_table(state[POSITIONS], decoder.config):
        rows, columns = decoder.config.grid
        raise UserError(
            f"diffusers computes the decoder's position table, for a {TABLE_SIDE}×{TABLE_SIDE} grid, and cannot "
            f"hold this one, which is for {rows}×{columns} or was trained: export as published instead"
        )
    return {renamed(key, _ATTENTION): value for key, value in state.items() if key != POSITIONS}


def decoder_from_diffusers(
    state: Mapping[str, Tensor], config: ViTDecoderConfig, source: object
) -> ViTDecoder:
    """Return a decoder that computes what diffusers computes from these weights, in evaluation mode.

    Args:
        state: Weights under diffusers' names; a position table among them is used.
        config: Shape of the network.
        source: What to call the weights in an error.

    Raises:
        PublishedFileError: Keys are missing, too many or of another shape.
    """
    model = build_model(config)
    names = {theirs: ours for ours, theirs in _ATTENTION.items()}
    weights = {renamed(key, names): value for key, value in state.items()}
    weights.setdefault(POSITIONS, _computed_table(config))
    load_exactly(model, weights, source)
    return model.eval()


def is_computed_table(table: Tensor, config: ViTDecoderConfig) -> bool:
    """Return whether a position table [1, 1 + N, width] is the one diffusers computes for the shape."""
    computed = _computed_table(config)
    return table.shape == computed.shape and torch.allclose(table.cpu().float(), computed, rtol=0, atol=1e-5)


def renamed(key: str, names: Mapping[str, str]) -> str:
    """Rename the part of a key that is one of `names`, between dots only."""
    for old, new in names.items():
        if f".{old}." in key:
            return key.replace(f".{old}.", f".{new}.")
    return key


def _computed_table(config: ViTDecoderConfig) -> Tensor:
    """Return the table diffusers computes, with the extra token's row of zeros: [1, 1 + N, width]."""
    return F.pad(sincos_table(config.width, config.grid, TABLE_SIDE / config.grid[0]), (0, 0, 1, 0))
