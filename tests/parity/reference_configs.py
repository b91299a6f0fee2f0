"""Our configurations for the settings by which the references build their networks, which the recordings hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards import UsageError
from train.models.config import DiTConfig, DiTDHConfig, GeneratorConfig, InContextDiTConfig
from train.weights.infer import PublishedFileError

_CONDITIONS = {"label": "label", "text": "text", "nwm": "frames"}
"""The reference's names of conditions and ours."""


def config_from_reference(params: Mapping[str, Any], target: str = "") -> GeneratorConfig:
    """Our configuration for `stage_2.params` of one of the YAML files of RAE, MF-RAE or RAEv2.

    Source: the constructors of DiTwDDTHead and LightningDiT in github:bytetriper/RAE src/stage2/models at
    a4d18c4, and of DiTwDDTHead_MF in github:sony/mf-rae src/stage2/models/DDT.py at fffc544; RAEv2's as in
    `in_context_config_from_reference`.

    Args:
        params: the parameters.
        target: `stage_2.target`, the class; one whose name ends in _MF is also told the end of a jump.

    Raises:
        PublishedFileError: a parameter is missing or unknown, or asks for what is not built.
        UsageError: the same, of RAEv2.
    """
    rest = dict(params)
    try:
        if "cond_arch" in params:
            return in_context_config_from_reference(params)
        side = rest.pop("input_size")
        widths, depths, heads = rest.pop("hidden_size"), rest.pop("depth"), rest.pop("num_heads")
        common: dict[str, Any] = {"token_width": rest.pop("in_channels"), "grid": (side, side)}
    except KeyError as error:
        raise PublishedFileError(f"the reference's settings have no {error.args[0]}") from error
    common["num_classes"] = rest.pop("num_classes", 1000)
    common["patch_size"] = _single(rest.pop("patch_size", 1))
    common["null_label"] = rest.pop("class_dropout_prob", 0.1) > 0
    common["end_time"] = target.endswith("_MF")
    common["shift"] = not rest.pop("wo_shift", False)
    is_dit_dh = isinstance(widths, list | tuple)
    own = {"use_pos_embed": "position_table"} if is_dit_dh else {"learn_sigma": "predict_sigma"}
    for theirs, ours in (_RENAMED | own).items():
        if theirs in rest:
            common[ours] = rest.pop(theirs)
    rest.pop("use_gembed", None)  # the reference takes and ignores it
    if rest:
        raise PublishedFileError(f"unknown parameters of the reference's model: {', '.join(sorted(rest))}")
    if not is_dit_dh:
        return DiTConfig(width=widths, depth=depths, num_heads=heads, **common)
    deep_heads, head_heads = heads if isinstance(heads, list | tuple) else (heads, heads)
    return DiTDHConfig(
        width=widths[0],
        depth=depths[0],
        num_heads=deep_heads,
        head_width=widths[1],
        head_depth=depths[1],
        head_num_heads=head_heads,
        **common,
    )


_RENAMED = {
    "mlp_ratio": "mlp_ratio",
    "use_qknorm": "qk_norm",
    "use_swiglu": "swiglu",
    "use_rope": "rope",
    "use_rmsnorm": "rms_norm",
}


def _single(patch_size: int | list[int]) -> int:
    """The reference takes a patch size for each part of a DiT-DH; here both parts share one."""
    sizes = set(patch_size) if isinstance(patch_size, list | tuple) else {patch_size}
    if len(sizes) != 1:
        raise PublishedFileError(f"both parts of a DiT-DH must have the same patch size; got {patch_size}")
    return int(sizes.pop())


def in_context_config_from_reference(params: Mapping[str, Any]) -> InContextDiTConfig:
    """Our configuration for `stage_2.params` of one of RAEv2's YAML files.

    Source: the arguments that raev2's recordings list; github:nanovisionx/RAEv2 configs/stage2 at 8a0d238.

    Raises:
        KeyError: a parameter is missing.
        UsageError: a parameter is unknown, or asks for what is not built.
    """
    rest = dict(params)
    side, patch = rest.pop("input_size"), rest.pop("patch_size", 1)
    widths, depths, heads = (_pair(rest.pop(name)) for name in ("hidden_size", "depth", "num_heads"))
    patches = set(_pair(patch))
    if len(patches) != 1:
        raise UsageError(f"both parts of a transformer must have the same patch size; got {patch}")
    tokens = rest.pop("cond_arch")
    condition = _CONDITIONS[rest.pop("condition_type", "label")]
    num_classes, condition_length = rest.pop("num_classes", 1000), tokens["num_c_tokens"]
    # What a condition does not use stays at its default, so that equal networks have equal configurations.
    own: dict[str, Any] = {"num_classes": num_classes if condition == "label" else 1}
    if condition in ("label", "text"):
        own["num_condition_tokens"] = condition_length
    if condition == "frames":
        num_tokens = (side // min(patches)) ** 2
        own["num_action_tokens"] = tokens["n_action_tokens"]
        own["num_frames"] = (condition_length - tokens["n_action_tokens"] - 1) // num_tokens
    if condition == "text":
        own["context_width"] = rest.pop("context_dim")
    if len(widths) == 2:
        own |= {"head_width": widths[1], "head_depth": depths[1], "head_num_heads": heads[-1]}
    config = InContextDiTConfig(
        token_width=rest.pop("in_channels"),
        grid=(side, side),
        width=widths[0],
        depth=depths[0],
        num_heads=heads[0],
        patch_size=min(patches),
        mlp_ratio=rest.pop("mlp_ratio", 4.0),
        base_depth=rest.pop("base_model_depth", None),
        condition=condition,  # type: ignore[arg-type]  # one of the literals of _CONDITIONS
        num_time_tokens=tokens["num_t_tokens"],
        num_scale_tokens=tokens["num_cfg_omega_tokens"] if rest.pop("use_cfg_conds", False) else 0,
        **own,
    )
    rest.pop("context_dim", None)  # other conditions do not use it
    if rest:
        raise UsageError(f"unknown parameters of the reference's model: {', '.join(sorted(rest))}")
    return config


def _pair(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
