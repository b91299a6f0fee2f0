"""DINOv3's weight files brought into timm's layout: original, transformers' and timm's own.

What timm's own loader leaves out is kept or refused here: the rotary periods a file holds, and the biases of query and
value, which timm has in its `_qkvb` models only.
"""

import re
from typing import Any

import torch
from torch import Tensor

from shards import UsageError

State = dict[str, Tensor]
PERIODS = "rope.periods"

# Source: github:facebookresearch/dinov3 at 94a96ac and transformers 4.57.1 modeling_dinov3_vit.py against timm 1.0.31
# eva.py. transformers 5 puts `model.` in front of the blocks.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^(embeddings\.)?(register_tokens|storage_tokens)$", "reg_token"),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^(model\.)?layer\.(\d+)\.", r"blocks.\2."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.(layer_scale|ls)([12])\.(lambda1|gamma)$", r".gamma_\2"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.(w3|down_proj)\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"^rope_embed\.periods$", PERIODS),
    )
)
_WITHOUT_EFFECT = re.compile(r"^(norm|local_cls_norm|head|mask_token)(\.|$)")


def dinov3_to_timm(state: State) -> State:
    """Return the same network under timm's names, without what its tokens do not depend on.

    Raises:
        UsageError: If keys have a bias, which timm's network does not have.
    """
    gated = any(".mlp.gate_proj." in name for name in state)
    tensors: State = {}
    for name, value in state.items():
        renamed = name
        for pattern, replacement in _RENAMES:
            renamed = pattern.sub(replacement, renamed)
        renamed = renamed.replace(".mlp.up_proj.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
        if not _WITHOUT_EFFECT.match(renamed):
            tensors[renamed] = value
    for stem in [name.removesuffix("q.weight") for name in tensors if name.endswith(".attn.q.weight")]:
        tensors[f"{stem}qkv.weight"] = torch.cat([tensors.pop(f"{stem}{part}.weight") for part in "qkv"])
        for part in "qkv":
            if f"{stem}{part}.bias" in tensors:
                tensors[f"{stem}{part}_bias"] = tensors.pop(f"{stem}{part}.bias")
    for name in [name for name in tensors if name.endswith(".qkv.bias")]:
        _split_bias(tensors, name)
    for name in [name for name in tensors if name.endswith(".attn.k_bias")]:
        if tensors.pop(name).any():
            raise UsageError(
                f"the weights do not fit: {name} is not zero, and DINOv3's keys have no bias; "
                "give the weights of the --encoder named"
            )
    return tensors


def _split_bias(tensors: State, name: str) -> None:
    """Replace a bias of query, key and value together by timm's two; the file's mask silences the key's."""
    bias, mask = tensors.pop(name), tensors.pop(f"{name}_mask", None)
    if mask is not None:
        bias = torch.where(mask == 0, torch.zeros_like(bias), bias * mask)
    stem = name.removesuffix("qkv.bias")
    for part, third in zip("qkv", bias.chunk(3), strict=True):
        tensors[f"{stem}{part}_bias"] = third.contiguous()


def require_same_biases(tensors: State, trunk: Any, name: str) -> None:
    """Refuse weights with biases of query and value for a network without, and the reverse.

    Raises:
        UsageError: Naming the timm model that the weights are of.
    """
    held = any(key.endswith(".attn.q_bias") for key in tensors)
    wanted = trunk.blocks[0].attn.q_bias is not None
    architecture = name.partition(".")[0]
    if held and not wanted:
        raise UsageError(
            f"--encoder {name} has no biases of query and value, and the weights hold them; "
            f"use --encoder {architecture}_qkvb"
        )
    if wanted and not held:
        raise UsageError(
            f"--encoder {name} has biases of query and value, and the weights hold none; "
            f"use --encoder {architecture.removesuffix('_qkvb')}"
        )


def set_periods(trunk: Any, periods: Tensor) -> None:
    """Make a network compute with the rotary periods of its weight file.

    Args:
        trunk: timm's network.
        periods: float [head width / 4]. The original loader takes what the file holds, though it went through
            bfloat16, where timm and transformers compute them.

    Raises:
        UsageError: If they are of another head width, or no periods.
    """
    own = trunk.rope.periods
    if periods.shape != own.shape:
        raise UsageError(
            f"the weights do not fit: {tuple(periods.shape)} rotary periods are of a head width of "
            f"{4 * periods.numel()}, not {4 * own.numel()}; give the weights of the --encoder named"
        )
    periods = periods.float()
    if not (torch.isfinite(periods).all() and (periods > 0).all()):
        raise UsageError("the weights do not fit: rotary periods must be above 0; give a whole file")
    own.copy_(periods)
    if trunk.rope.pos_embed_cached is not None:
        trunk.rope.pos_embed_cached.copy_(trunk.rope.get_embed(list(trunk.rope.feat_shape)))
