"""Frozen image encoders: a timm vision transformer by name, exact to the reference wrappers of RAE.

An encoder turns pixels in [0, 1] into raw tokens [B, N, D]: bicubic resize to its input size, normalisation,
the blocks, a final LayerNorm without affine, prefix tokens (class, registers) dropped; tokens are the last block's, or
several blocks' combined. The families of `families.py` follow the reference's conventions; any other timm ViT follows
timm's. `docs/encoding.md` lists the traps between timm and transformers that are handled here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.encoders.aggregation import choose_aggregation
from pipeline.encoders.dinov3_weights import PERIODS, State, require_same_biases, set_periods
from pipeline.encoders.families import RAEV2, Family, family_of
from pipeline.encoders.frozen import Encoder
from pipeline.encoders.recipes import resolve
from pipeline.encoders.weights import digest, read_weights, resize_positions, to_timm_layout
from shards import EncoderIdentity, UsageError, UserError

_SEED_DIGITS = 19  # all such numbers are seeds of torch, which end below 2**64
_REFUSALS = (
    TypeError,
    AssertionError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    AttributeError,
)
"""What timm and torch refuse the arguments of a model with, whichever comes first."""


def create_encoder(
    name: str,
    weights: str = "pretrained",
    *,
    input_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    combination: str | None = None,
) -> Encoder:
    """Build a frozen encoder on the CPU, in float32.

    Args:
        name: timm name, such as `vit_base_patch14_reg4_dinov2` or `vit_base_patch16_224.mae`, or one of
            `pipeline.encoders.recipes.RECIPES`.
        weights: `pretrained` (timm's, from the HuggingFace hub or its local cache), `random:SEED`, or the
            path of a file in timm, transformers or original layout.
        input_size: Side in pixels the network sees; None takes the family's default.
        model_args: Further arguments of the timm model, such as `{"embed_dim": 64, "depth": 4}`.
        layers: Blocks whose tokens are combined, counted from 0, ascending; None takes the last.
        combination: How, one of `pipeline.encoders.aggregation.COMBINATIONS`; None takes the family's for several
            blocks, and nothing but its tokens for one.

    Raises:
        UsageError: If there is no such encoder or block, the size does not divide into patches, or the weights do not
            fit.
    """
    name, layers, combination = resolve(name, layers, combination)
    family = family_of(name)
    overrides = dict(model_args or {})
    trunk, size = _build(name, weights, input_size, overrides)
    aggregation = choose_aggregation(
        len(trunk.blocks),
        f"--encoder {name}",
        layers,
        combination,
        option="--layers",
        spatial_mean=family.spatial_mean,
    )
    mean, std = family.mean or _timm_config(name).mean, family.std or _timm_config(name).std

    if weights.startswith("random:"):
        state = to_timm_layout(
            trunk.state_dict(), class_position=True, dinov3=family.rotary, final_affine=family.final_affine
        )
    else:
        state = _load(trunk, name, weights, family, overrides)
        _require_finite(state, weights)
    final_norm = _finish_norms(trunk, family)

    architecture, _, tag = name.partition(".")
    label = name if tag == RAEV2 else architecture
    if overrides:
        label += "[" + ",".join(f"{key}={value}" for key, value in sorted(overrides.items())) + "]"
    grid = trunk.patch_embed.grid_size
    identity = EncoderIdentity(
        name=label,
        weights=weights if weights.startswith("random:") or weights == "pretrained" else "file",
        weights_digest=digest(state),
        preprocessing={
            "resize": _resize_rule(family, int(grid[0])),
            "mean": list(mean),
            "std": list(std),
            "positions": "bicubic" + (", antialias" if family.antialias_positions else ""),
            "model_args": json.loads(json.dumps(dict(family.model_args))),
        },
        input_size=size,
        grid=(int(grid[0]), int(grid[1])),
        width=int(trunk.embed_dim),
        prefix_tokens=int(trunk.num_prefix_tokens),
        final_norm=final_norm,
        aggregation=aggregation.identity(len(trunk.blocks)),
    )
    return Encoder(trunk, identity, aggregation, family, mean, std)


def _resize_rule(family: Family, grid: int) -> str:
    rule = "bicubic, align_corners=False, antialias=False, not clamped"
    return f"to {grid * family.image_patch} px first, {rule}" if family.image_patch else rule


def _require_finite(state: Mapping[str, Tensor], weights: str) -> None:
    """Refuse weights that are not finite."""
    for tensor, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UsageError(f"--weights {weights} holds NaN or infinity in {tensor}; give whole weights")


def token_shape(
    name: str, *, input_size: int | None = None, model_args: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Return token rows, columns and channels (h, w, D) of an encoder, without making its weights.

    Raises:
        UsageError: If there is no such encoder, or the size does not divide into patches.
    """
    name, _, _ = resolve(name, None, None)
    with torch.device("meta"):
        trunk, _ = _build(name, "random:0", input_size, model_args or {})
    h, w = trunk.patch_embed.grid_size
    return int(h), int(w), int(trunk.embed_dim)


def _require_known(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture[:12]}*")[:4]) or "vit_base_patch14_reg4_dinov2"
        raise UsageError(f"--encoder must be a timm vision transformer, got {name}; such as {near}")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known and not (tag == RAEV2 and family_of(name) != family_of(architecture)):
        raise UsageError(
            f"--encoder {architecture} has no weights named {tag!r} in timm; such as {', '.join(known[:4])}"
        )


def _timm_config(name: str) -> Any:
    return timm.get_pretrained_cfg(_timm_name(name))


def _timm_name(name: str) -> str:
    return name.removesuffix(f".{RAEV2}")


def _build(name: str, weights: str, input_size: int | None, model_args: Mapping[str, Any]) -> tuple[Any, int]:
    """Return an untrained timm ViT and the side of its square inputs; random weights, if asked for, are seeded."""
    _require_known(name)
    family = family_of(name)
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size must be at least 1, got {input_size}; such as 224")
    size = input_size or family.input_size(name) or _timm_config(name).input_size[-1]
    model_args = {**family.model_args, **model_args}
    architecture = name.partition(".")[0]
    seed = 0
    if weights.startswith("random:"):
        text = weights.removeprefix("random:")
        if not (text.isdecimal() and len(text) <= _SEED_DIGITS):
            raise UsageError(
                f"--weights random:SEED needs a whole number of at most {_SEED_DIGITS} digits as SEED, got {text!r}; "
                "such as random:0"
            )
        seed = int(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            trunk = timm.create_model(
                architecture, pretrained=False, img_size=size, num_classes=0, global_pool="", **model_args
            )
        except _REFUSALS as error:
            # Convolutional networks take inputs of any size, and are not told one.
            if "unexpected keyword argument 'img_size'" in str(error):
                raise UsageError(_not_plain(name)) from error
            what = " and ".join(
                [f"inputs of {size}", *(f"{key}={value}" for key, value in model_args.items())]
            )
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"--encoder {name} cannot be built for {what}: {reason}; "
                "give another --input-size or other --encoder-args"
            ) from error
    if not isinstance(trunk, VisionTransformer | Eva):
        raise UsageError(_not_plain(name))
    patch = int(trunk.patch_embed.patch_size[0])
    if size % patch:
        down = size - size % patch
        raise UsageError(
            f"--input-size must be a multiple of the patch size {patch}, got {size}; "
            f"use {down} or {down + patch}"
        )
    return trunk, size


def _not_plain(name: str) -> str:
    return f"--encoder must be a plain vision transformer, got {name}; such as vit_base_patch14_reg4_dinov2"


def _load(trunk: Any, name: str, weights: str, family: Family, overrides: Mapping[str, Any]) -> State:
    """Load trained weights into `trunk`; return them with position embeddings as they came."""
    pretrained = weights == "pretrained"
    raw = _pretrained_state(name, overrides) if pretrained else read_weights(Path(weights).expanduser())
    own_positions = 0 if trunk.no_embed_class else int(trunk.num_prefix_tokens)
    state = to_timm_layout(
        raw,
        class_position=not trunk.no_embed_class,
        dinov3=family.rotary,
        final_affine=family.final_affine,
    )
    fitted = dict(state)
    if family.rotary:
        require_same_biases(state, trunk, name)
        periods = fitted.pop(PERIODS, None)
        if periods is not None:
            exact = trunk.rope.periods.clone()
            set_periods(trunk, periods)
            if torch.equal(exact, trunk.rope.periods):
                del state[PERIODS]  # what other layouts leave to be computed
    if "pos_embed" in state and trunk.pos_embed is not None:
        fitted["pos_embed"] = resize_positions(
            state["pos_embed"],
            int(trunk.patch_embed.grid_size[0]),
            num_prefix=own_positions,
            antialias=family.antialias_positions,
        )
    if not family.final_affine:
        trunk.norm = nn.Identity()  # `_finish_norms` puts the one without affine there
    try:
        trunk.load_state_dict(fitted, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise UsageError(f"--weights {weights} do not fit --encoder {name}: {lines[0][:300]}") from error
    return state


def _pretrained_state(name: str, overrides: Mapping[str, Any]) -> State:
    try:
        native = timm.create_model(_timm_name(name), pretrained=True, num_classes=0, **overrides)
    except (OSError, RuntimeError, ValueError) as error:
        # What huggingface_hub raises for a missing net, a missing file and offline mode.
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--weights pretrained could not be had for --encoder {name} ({reason}); "
            "connect to huggingface.co, or give --weights PATH of a downloaded model.safetensors"
        ) from error
    state: State = native.state_dict()
    return state


def _finish_norms(trunk: Any, family: Family) -> str:
    """Set the family's eps everywhere and replace the tokens' LayerNorm by the family's; return its kind."""
    norms = [module for module in trunk.modules() if isinstance(module, nn.LayerNorm)]
    eps = family.norm_eps
    if eps is None:
        eps = norms[-1].eps if norms else 1e-6
    else:
        for norm in norms:
            norm.eps = eps
    eps = family.final_eps or eps
    if family.final_affine:
        trunk.norm.eps = eps
        return f"LayerNorm with its affine, eps {eps:g}"
    trunk.norm = nn.LayerNorm(trunk.embed_dim, eps=eps, elementwise_affine=False)
    return f"LayerNorm without affine, eps {eps:g}"
