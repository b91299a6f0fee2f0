"""Encoder weights: where they come from, and every published file layout brought into timm's.

Three layouts hold the same network under different names: timm's own, HuggingFace transformers' (DINOv2,
DINOv3, ViT-MAE, SigLIP) and the authors' original files. `to_timm_layout` renames all of them to timm's and drops
what the tokens do not depend on (heads, final LayerNorm affine, decoder, mask token), so that the digest
names what produced the tokens.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for a damaged file or one that would run code
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.encoders.dinov3_weights import State, dinov3_to_timm
from shards import UsageError

_PATCH_WEIGHTS = (
    "patch_embed.proj.weight",  # timm and the original DINOv2 and MAE files
    "embeddings.patch_embeddings.projection.weight",  # transformers: DINOv2, ViT-MAE
    "embeddings.patch_embedding.weight",  # transformers: SigLIP
    "embeddings.patch_embeddings.weight",  # transformers: DINOv3
)

# Source: transformers 4.56.2 modeling_{dinov2_with_registers,vit_mae,siglip}.py against timm 1.0.31
# vision_transformer.py.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^(embeddings\.)?register_tokens$", "reg_token"),
        (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.(attention\.output\.dense|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.(weights_in|w12)\.", ".mlp.fc1."),
        (r"\.mlp\.(weights_out|w3)\.", ".mlp.fc2."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
    )
)
FINAL_AFFINE = ("norm.weight", "norm.bias")
_WITHOUT_EFFECT = re.compile(r"^(norm|fc_norm|head|head_dist|attn_pool|decoder[^.]*|mask_token)(\.|$)")


def read_weights(path: Path) -> State:
    """Return the tensors of a safetensors file, a torch file of plain tensors, or a folder with `model.safetensors`.

    Raises:
        UsageError: If there is no such file, or it is neither format; files that would run code are refused.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UsageError(
            f"--weights must be `pretrained`, `random:SEED` or an existing file, got {path}: no such file"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UsageError(
            f"--weights {path} is damaged or holds more than plain tensors; give a safetensors file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--weights {path} is not a readable safetensors or torch weights file: {reason}"
        ) from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            _require_one_network(path, wrapper, content)
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UsageError(f"--weights {path} holds no table of tensors; give a state dict file")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _require_one_network(path: Path, wrapper: str, content: Mapping[Any, Any]) -> None:
    """Refuse a file that holds both weights and their average, because either may be meant."""
    averages = [
        name
        for name in (f"{wrapper}_ema", f"ema_{wrapper}", "ema", "model_ema")
        if isinstance(content.get(name), dict) and name != wrapper
    ]
    if averages:
        raise UsageError(
            f"--weights {path} holds {wrapper} and {averages[0]} beside each other; save the one that is "
            "meant alone, such "
            "as by safetensors.torch.save_file"
        )


def to_timm_layout(
    state: Mapping[str, Tensor], *, class_position: bool, dinov3: bool = False, final_affine: bool = False
) -> State:
    """Rename a state dict of any known layout to timm's names and drop what the tokens do not depend on.

    Args:
        state: A state dict in timm, transformers or original layout; a common prefix such as `vit.` may be
            there.
        class_position: Whether the timm model adds a position embedding to its class token. Where it does not
            (DINOv2 with registers) and the file has one, it is folded into the class token.
        dinov3: Whether the layouts are those of DINOv3.
        final_affine: Whether the tokens depend on weight and bias of the final LayerNorm.

    Raises:
        UsageError: If no vision transformer is found in it, or it has what timm's network has not.
    """
    prefix = _prefix_of(state)
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if dinov3:
        return dinov3_to_timm(own)
    tensors: State = {}
    for name, value in own.items():
        renamed = name
        for pattern, replacement in _RENAMES:
            renamed = pattern.sub(replacement, renamed)
        if (final_affine and renamed in FINAL_AFFINE) or not _WITHOUT_EFFECT.match(renamed):
            tensors[renamed] = value
    _join_query_key_value(tensors)
    positions = tensors.get("pos_embed")
    if positions is not None and positions.ndim == 2:
        tensors["pos_embed"] = positions[None]
    if not class_position:
        _fold_class_position(tensors)
    return tensors


def _prefix_of(state: Mapping[str, Tensor]) -> str:
    for ending in _PATCH_WEIGHTS:
        for name in state:
            if name.endswith(ending):
                return name.removesuffix(ending)
    some = ", ".join(sorted(state)[:3]) or "nothing"
    raise UsageError(
        f"the weights hold no vision transformer in timm, transformers or original layout (found {some}, …); "
        "give the file of an image encoder"
    )


def _join_query_key_value(tensors: State) -> None:
    """Concatenate separate query, key and value matrices in that order, as timm's `attn.qkv` holds them."""
    parts = re.compile(r"^(blocks\.\d+\.attn\.)(?:query|q)\.(weight|bias)$")
    for name in [name for name in tensors if parts.match(name)]:
        match = parts.match(name)
        assert match is not None
        stem, kind = match.groups()
        names = ("query", "key", "value") if ".query." in name else ("q", "k", "v")
        tensors[f"{stem}qkv.{kind}"] = torch.cat([tensors.pop(f"{stem}{part}.{kind}") for part in names])


def _fold_class_position(tensors: State) -> None:
    """Add the class token's position embedding to the class token, if the file still has it apart.

    Source: timm 1.0.31 `_convert_dinov2`; without it tokens of DINOv2 with registers move by up to 0.1.
    """
    positions = tensors.get("pos_embed")
    if positions is None or "cls_token" not in tensors or is_square(positions.shape[1]):
        return
    tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    tensors["pos_embed"] = positions[:, 1:]


def is_square(count: int) -> bool:
    """Return whether `count` patches form a square grid."""
    return math.isqrt(count) ** 2 == count


def resize_positions(positions: Tensor, grid: int, *, num_prefix: int, antialias: bool) -> Tensor:
    """Return position embeddings resampled to another grid: bicubic, align_corners False, in float32.

    Args:
        positions: float [1, num_prefix + n², D], prefix first.
        grid: Side of the wanted grid, in patches.
        num_prefix: How many leading rows belong to prefix tokens; they stay as they are.
        antialias: DINOv2 in transformers antialiases here, MAE and SigLIP do not.

    Returns:
        float32 [1, num_prefix + grid², D].

    Source:
        transformers 4.56.2, `interpolate_pos_encoding` of the three models.

    Raises:
        UsageError: If the stored embeddings are no square grid.
    """
    prefix, patches = positions[:, :num_prefix].float(), positions[:, num_prefix:].float()
    if not is_square(patches.shape[1]):
        raise UsageError(
            f"the weights do not fit: {patches.shape[1]} position embeddings are no square grid; "
            "give the weights of the --encoder named"
        )
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return torch.cat([prefix, patches], dim=1)
    plane = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix, plane.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def digest(state: Mapping[str, Tensor]) -> str:
    """Return SHA-256 (hex) over names, shapes and float32 values in name order: one for all layouts of a network."""
    sha = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{name}{tuple(values.shape)}".encode())
        sha.update(values.numpy().tobytes())
    return sha.hexdigest()
