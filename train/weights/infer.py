"""Which network published weights belong to: from their keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shards import UserError
from train.models.config import (
    DECODER_MLP_WIDTHS,
    DECODER_SIZES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DiTConfig,
    DiTDHConfig,
    GeneratorConfig,
    ViTDecoderConfig,
    swiglu_width,
)
from train.weights.infer_in_context import (
    infer_in_context_config,
    is_in_context,
)

RGB = tuple[float, float, float]
MLP_RATIO = 4.0
"""The only MLP ratio there are published weights for; it cannot be read from keys without doubt."""


class PublishedFileError(UserError):
    """A file of published weights is not what it must be."""


def infer_dit_config(
    state: Mapping[str, Tensor], source: object, base_depth: int | None = None
) -> GeneratorConfig:
    """Return the diffusion transformer a state dict belongs to, assumed square.

    Args:
        state: the weights.
        source: what to call them in an error.
        base_depth: of a transformer of RAEv2, deep blocks after which the base output is read; None: as published.

    Raises:
        PublishedFileError: the keys are not those of one.
        UsageError: there is a base output and nothing says where it is read.
    """
    try:
        if is_in_context(state):
            return infer_in_context_config(state, source, base_depth)
        return _dit_dh_config(state) if "s_embedder.proj.weight" in state else _dit_config(state)
    except KeyError as error:
        raise PublishedFileError(
            f"{source} is not a transformer whose configuration can be read from it: "
            f"it has no {error.args[0]}; give its configuration"
        ) from error


def infer_decoder_config(
    state: Mapping[str, Tensor],
    source: object,
    *,
    pixel_mean: RGB = IMAGENET_MEAN,
    pixel_std: RGB = IMAGENET_STD,
) -> ViTDecoderConfig:
    """Return the ViT decoder a state dict belongs to, assumed square; its heads follow from its published width.

    Args:
        state: the weights.
        source: what to call them in an error.
        pixel_mean: mean of the encoder's pixels, which weights do not tell.
        pixel_std: their standard deviation.

    Raises:
        PublishedFileError: the keys are not a decoder's, or the widths not published ones.
    """
    try:
        width, token_width = state["decoder_embed.weight"].shape
        mlp_width = len(state["decoder_layers.0.intermediate.dense.bias"])
        side = math.isqrt(state["decoder_pos_embed"].shape[1] - 1)
        patch_size = math.isqrt(len(state["decoder_pred.bias"]) // 3)
    except KeyError as error:
        raise PublishedFileError(f"{source} is not a ViT decoder: it has no {error.args[0]}") from error
    num_heads = {
        (stack.width, DECODER_MLP_WIDTHS[size]): stack.num_heads for size, stack in DECODER_SIZES.items()
    }
    if (width, mlp_width) not in num_heads:
        raise PublishedFileError(
            f"{source} is a decoder of width {width} and MLP width {mlp_width}, which is no published size, so "
            "its number of heads is not known: give its configuration"
        )
    return ViTDecoderConfig(
        token_width=token_width,
        grid=(side, side),
        width=width,
        depth=len(_block_widths(state, "decoder_layers.{}.layernorm_before.bias")),
        num_heads=num_heads[width, mlp_width],
        mlp_width=mlp_width,
        patch_size=patch_size,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def _dit_dh_config(state: Mapping[str, Tensor]) -> DiTDHConfig:
    width, head_width = (len(state[f"{part}_embedder.proj.bias"]) for part in "sx")
    if width == head_width:
        # Then nothing says which of the blocks are the head's.
        raise KeyError("s_projector.weight")
    widths = _block_widths(state, "blocks.{}.attn.proj.bias")
    return DiTDHConfig(
        width=width,
        depth=widths.count(width),
        num_heads=width // state["enc_feat_rope.freqs_cos"].shape[1],
        head_width=head_width,
        head_depth=widths.count(head_width),
        head_num_heads=head_width // state["dec_feat_rope.freqs_cos"].shape[1],
        position_table="pos_embed" in state,
        **_shared_config(state, width, len(state["enc_feat_rope.freqs_cos"])),
    )


def _dit_config(state: Mapping[str, Tensor]) -> DiTConfig:
    width = len(state["x_embedder.proj.bias"])
    _, token_width, patch_size, _ = state["x_embedder.proj.weight"].shape
    return DiTConfig(
        width=width,
        depth=len(_block_widths(state, "blocks.{}.attn.proj.bias")),
        num_heads=width // state["feat_rope.freqs_cos"].shape[1],
        predict_sigma=len(state["final_layer.linear.bias"]) == 2 * token_width * patch_size**2,
        **_shared_config(state, width, len(state["feat_rope.freqs_cos"])),
    )


def _shared_config(state: Mapping[str, Tensor], width: int, num_tokens: int) -> dict[str, Any]:
    """Infer the fields that a DiT and a DiT-DH share; the label table is taken to have a row for no class."""
    _, token_width, patch_size, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(num_tokens) * patch_size
    swiglu = "blocks.0.mlp.w3.weight" in state
    if swiglu and state["blocks.0.mlp.w3.weight"].shape[1] != swiglu_width(width, MLP_RATIO):
        raise KeyError(f"blocks.0.mlp.w3.weight for MLP ratio {MLP_RATIO}")
    return {
        "token_width": token_width,
        "grid": (side, side),
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": patch_size,
        "mlp_ratio": MLP_RATIO,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "swiglu": swiglu,
        "rms_norm": "blocks.0.norm1.weight" in state,
        "rope": True,
        "shift": len(state["blocks.0.adaLN_modulation.1.bias"]) == 6 * width,
        "end_time": "r_embedder.W" in state,
    }


def _block_widths(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Return the widths of the blocks in order, each from the key `pattern` names."""
    widths: list[int] = []
    while (key := pattern.format(len(widths))) in state:
        widths.append(len(state[key]))
    return widths
