"""Frozen image encoders: a timm vision transformer by name, exact to the reference wrappers of RAE.

An encoder turns pixels in [0, 1] into raw tokens [B, N, D]: bicubic resize to its input size, normalisation,
the blocks, a final LayerNorm without affine, prefix tokens (class, registers) dropped; tokens are the last block's, or
several blocks' combined. The families of `families.py` follow the reference's conventions; any other timm ViT follows
timm's. `docs/encoding.md` lists the traps between timm and transformers that are handled here.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.encoders.aggregation import (
    COMBINATIONS,
    MEAN,
    WITH_SPATIAL_MEAN,
    Aggregation,
    check_within,
    combine,
)
from pipeline.encoders.dinov3_weights import PERIODS, State, require_same_biases, set_periods
from pipeline.encoders.families import RAEV2, Family, Triple, family_of
from pipeline.encoders.recipes import resolve
from pipeline.encoders.weights import digest, read_weights, resize_positions, to_timm_layout
from pipeline.settings.layers import check_ascending
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


@dataclass(frozen=True)
class EncoderOutput:
    """What one combination of blocks gives for some images.

    Attributes:
        tokens: Raw tokens, float32 [B, N, D].
        class_token: The highest block's class token after the same norm, float32 [B, D]; None if it was not asked for.
    """

    tokens: Tensor
    class_token: Tensor | None


class Encoder(nn.Module):
    """A frozen encoder, from pixels to raw tokens.

    Args:
        trunk: timm model whose final norm is the tokens'.
        identity: What it is; names the store's tokens.
        aggregation: Which blocks its tokens come from.
        family: Its conventions.
        mean: Pixel mean, RGB.
        std: Pixel standard deviation, RGB.
    """

    def __init__(
        self,
        trunk: nn.Module,
        identity: EncoderIdentity,
        aggregation: Aggregation,
        family: Family,
        mean: Triple,
        std: Triple,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.identity = identity
        self.aggregation = aggregation
        self.precision = "float32"
        self._family = family
        self._pixel_statistics = mean, std
        self._blocks = self._run_blocks
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False).eval()

    def of_blocks(self, layers: Sequence[int], combination: str | None, option: str) -> "Encoder":
        """The encoder that combines other blocks of the same network; both share it.

        Args:
            layers: Blocks, counted from 0, ascending.
            combination: How; None takes the family's.
            option: What names them, for messages.

        Raises:
            UsageError: If there are no such blocks.
        """
        name = self.identity.name
        aggregation = _aggregation(self.trunk, name, self._family, layers, combination, option)
        identity = dataclasses.replace(
            self.identity,
            aggregation=aggregation.identity(len(self.trunk.blocks)),  # type: ignore[arg-type]
        )
        return Encoder(self.trunk, identity, aggregation, self._family, *self._pixel_statistics)

    def require_class_token(self) -> None:
        """Refuses a network without class token.

        Raises:
            UsageError: Naming it.
        """
        if getattr(self.trunk, "cls_token", None) is None:
            raise UsageError(
                f"--class-token: {self.identity.name} has no class token; leave it out, or name another --encoder"
            )

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (torch's own signature)
        """Stays as it is: networks with rotary positions would scale their coordinates at random while training."""
        del mode
        return super().train(mode=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.get_buffer("mean").device

    def to_device(self, device: torch.device, precision: str) -> "Encoder":
        """Moves the encoder to `device`, to compute in `float32` or `bfloat16` (matrix products only)."""
        if precision not in ("float32", "bfloat16"):
            raise UsageError(f"--precision must be float32 or bfloat16, got {precision}")
        self.precision = precision
        if precision == "float32":
            # The reference's numbers are float32 throughout; on a GPU convolutions would silently use TF32.
            torch.backends.cudnn.allow_tf32 = False
        return self.to(device)

    def compile_trunk(self) -> None:
        """Runs the network through torch.compile from now on."""
        self._blocks = torch.compile(self._run_blocks)

    def prepare(self, pixels: Tensor) -> Tensor:
        """What the network sees: float, resized, normalised.

        Args:
            pixels: uint8 [B, 3, P, P] in 0..255, or float [B, 3, P, P] in [0, 1].

        Returns:
            float32 [B, 3, S, S] for input size S; a resize may overshoot [0, 1] and is not clamped.

        Source:
            github:bytetriper/RAE at a4d18c4, src/stage1/rae.py `RAE.encode`.
        """
        values = pixels.float()
        if not pixels.is_floating_point():
            values = values / 255
        sizes = [self.identity.input_size]
        if self._family.picture_patch is not None:
            sizes = [self.identity.grid[0] * self._family.picture_patch, *sizes]
        for size in sizes:
            if values.shape[-2:] != (size, size):
                values = F.interpolate(values, size=(size, size), mode="bicubic", align_corners=False)
        return (values - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, pixels: Tensor) -> Tensor:
        """Raw tokens float32 [B, N, D] of pixels uint8 [B, 3, P, P] or float [B, 3, P, P] in [0, 1]."""
        return self.tokens_of(self.prepare(pixels))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """As `forward`, without any gradient state."""
        tokens: Tensor = self(pixels)
        return tokens

    def tokens_of(self, normalised: Tensor) -> Tensor:
        """Raw tokens float32 [B, N, D] of normalised pixels float32 [B, 3, S, S]."""
        (output,) = self._outputs(normalised, (self.aggregation,), class_token=False)
        return output.tokens

    @torch.inference_mode()
    def encode_all(
        self, pixels: Tensor, aggregations: Sequence[Aggregation], *, class_token: bool
    ) -> list[EncoderOutput]:
        """What several combinations of blocks give, from one pass over the network.

        Args:
            pixels: As `prepare` takes them.
            aggregations: What is wanted.
            class_token: Whether each one's class token is wanted too.
        """
        return self._outputs(self.prepare(pixels), tuple(aggregations), class_token=class_token)

    def _outputs(
        self, normalised: Tensor, aggregations: tuple[Aggregation, ...], *, class_token: bool
    ) -> list[EncoderOutput]:
        low = self.precision == "bfloat16"
        with torch.autocast(normalised.device.type, dtype=torch.bfloat16, enabled=low):
            tokens, class_tokens = self._blocks(normalised, aggregations, class_token)
        return [EncoderOutput(*pair) for pair in zip(tokens, class_tokens, strict=True)]

    def _run_blocks(
        self,
        normalised: Tensor,
        aggregations: tuple[Aggregation, ...],
        class_token: bool,  # noqa: FBT001
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The network as it is compiled: tokens and class token by aggregation."""
        layers = sorted({layer for aggregation in aggregations for layer in aggregation.layers})
        outputs = self.trunk.forward_intermediates(  # type: ignore[operator]
            normalised,
            indices=layers,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # Networks without prefix tokens give patch tokens alone.
        pairs = [pair if isinstance(pair, tuple) else (pair, None) for pair in outputs]
        by_layer = dict(zip(layers, pairs, strict=True))
        tokens = combine(aggregations, ((layer, self._normed(pair[0])) for layer, pair in by_layer.items()))
        class_tokens = [
            self._normed(by_layer[aggregation.highest][1][:, 0]) if class_token else None
            for aggregation in aggregations
        ]
        return tokens, class_tokens

    def _normed(self, tokens: Tensor) -> Tensor:
        """Tokens float [..., D] after the last norm, float32."""
        normed: Tensor = self.trunk.norm(tokens.float())  # type: ignore[operator]
        return normed.float()


def _require_finite(state: Mapping[str, Tensor], weights: str) -> None:
    """Refuses weights that no storage type of tokens could make up for."""
    for tensor, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UsageError(f"--weights {weights} holds NaN or infinity in {tensor}; give whole weights")


def create_encoder(
    name: str,
    weights: str = "pretrained",
    *,
    input_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    combination: str | None = None,
) -> Encoder:
    """Builds a frozen encoder on the CPU, in float32.

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
    aggregation = _aggregation(trunk, name, family, layers, combination, "--layers")
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


def _aggregation(
    trunk: Any,
    name: str,
    family: Family,
    layers: Sequence[int] | None,
    combination: str | None,
    option: str,
) -> Aggregation:
    depth = len(trunk.blocks)
    if combination is not None and combination not in COMBINATIONS:
        raise UsageError(f"--combination must be one of {', '.join(COMBINATIONS)}, got {combination}")
    chosen = (depth - 1,) if layers is None else tuple(layers)
    check_ascending(chosen, option, ",".join(map(str, chosen)))
    check_within(chosen, depth, option, f"--encoder {name}")
    if combination is None:
        combination = WITH_SPATIAL_MEAN if family.spatial_mean and len(chosen) > 1 else MEAN
    return Aggregation(chosen, combination)


def _resize_rule(family: Family, grid: int) -> str:
    rule = "bicubic, align_corners=False, antialias=False, not clamped"
    return f"to {grid * family.picture_patch} px first, {rule}" if family.picture_patch else rule


def token_shape(
    name: str, *, input_size: int | None = None, model_args: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Token rows, columns and channels (h, w, D) of an encoder, without making its weights.

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
    """An untrained timm ViT and the side of its square inputs; random weights are seeded where they are asked for."""
    _require_known(name)
    family = family_of(name)
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size must be at least 1, got {input_size}; such as 224")
    size = input_size or family.input_size(name) or _timm_config(name).input_size[-1]
    given, model_args = model_args, {**family.model_args, **model_args}
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
            what = " and ".join([f"inputs of {size}", *(f"{key}={value}" for key, value in given.items())])
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
    """Loads trained weights into `trunk`; returns them with position embeddings as they came."""
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
    """Sets the family's eps everywhere and puts the tokens' LayerNorm in its place; says which that is."""
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
