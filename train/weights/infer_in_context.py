"""Which of RAEv2's transformers published weights belong to: from keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shards import UsageError
from train.models.config import RAEV2_BASE_DEPTHS, RAEV2_SIZES, InContextDiTConfig

_KEYS = {"embedding_table.weight": "label", "norm.weight": "text", "action_tokens": "frames"}
"""What under `ctx_embedder.` tells which condition a network has."""

_PUBLISHED_BASE_DEPTHS = {(RAEV2_SIZES["xl"].width, RAEV2_SIZES["xl"].depth): RAEV2_BASE_DEPTHS["xl"]}


def is_in_context(state: Mapping[str, Tensor]) -> bool:
    """Return whether keys are those of a transformer with conditions as tokens."""
    return "t_embedder.learnable_tokens" in state


def infer_in_context_config(
    state: Mapping[str, Tensor], source: object, base_depth: int | None = None
) -> InContextDiTConfig:
    """Return the network a state dict belongs to, assumed square.

    Args:
        state: the weights.
        source: what to call them in an error.
        base_depth: deep blocks after which the base output is read, which no key shows; None: the published network's.

    Raises:
        KeyError: a key is missing.
        UsageError: there is a base output and nothing says where it is read.
    """
    head = "s_embedder.proj.weight" in state
    deep, rope = ("s_embedder", "enc_rope") if head else ("x_embedder", "rope")
    width, token_width, patch_size, _ = state[f"{deep}.proj.weight"].shape
    blocks = _numbers(state)
    depth = sum(f"blocks.{i}.adaln_modulation.1.weight" not in state for i in blocks)
    scale = state.get("cfg_w_embedder.learnable_tokens")
    counts: dict[str, Any] = {
        "num_time_tokens": len(state["t_embedder.learnable_tokens"]),
        "num_scale_tokens": 0 if scale is None else len(scale),
    }
    others = len(state[f"{rope}.freqs_cos"]) - sum(counts.values())
    condition = next((name for key, name in _KEYS.items() if f"ctx_embedder.{key}" in state), "none")
    own: dict[str, Any] = {}
    if head:
        num_tokens = len(state["dec_rope.freqs_cos"])
        own = {
            "head_width": len(state["x_embedder.proj.bias"]),
            "head_depth": len(blocks) - depth,
            "head_num_heads": len(state["x_embedder.proj.bias"]) // state["dec_rope.freqs_cos"].shape[1],
        }
    if condition == "label":
        counts["num_condition_tokens"] = len(state["ctx_embedder.learnable_tokens"])
        others -= counts["num_condition_tokens"]
    if not head:
        if condition in ("text", "frames"):
            raise KeyError("dec_rope.freqs_cos")  # then nothing tells image and condition tokens apart
        num_tokens = others
    if condition == "text":
        counts["num_condition_tokens"] = others - num_tokens
        own["context_width"] = len(state["ctx_embedder.norm.weight"])
    if condition == "frames":
        counts["num_action_tokens"] = len(state["ctx_embedder.action_tokens"])
        counts["num_frames"] = (others - num_tokens - counts["num_action_tokens"] - 1) // num_tokens
    table = state.get("ctx_embedder.embedding_table.weight")
    side = math.isqrt(num_tokens) * patch_size
    return InContextDiTConfig(
        token_width=token_width,
        grid=(side, side),
        num_classes=1 if table is None else len(table) - 1,
        width=width,
        depth=depth,
        num_heads=width // len(state["blocks.0.attn.q_norm.weight"]),
        patch_size=patch_size,
        base_depth=_base_depth(state, source, (width, depth), base_depth),
        condition=condition,  # type: ignore[arg-type]  # one of the literals of _KEYS
        **counts,
        **own,
    )


def _base_depth(
    state: Mapping[str, Tensor], source: object, stack: tuple[int, int], given: int | None
) -> int | None:
    if "base_final_layer.linear.weight" not in state:
        return None
    depth = given or _PUBLISHED_BASE_DEPTHS.get(stack)
    if depth is None:
        raise UsageError(
            f"{source} has a base output, and no key shows after which of its {stack[1]} blocks it is read: "
            "give --base-depth"
        )
    return depth


def _numbers(state: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of the blocks."""
    numbers: list[int] = []
    while f"blocks.{len(numbers)}.norm1.weight" in state:
        numbers.append(len(numbers))
    return numbers
