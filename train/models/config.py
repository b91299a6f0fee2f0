"""Shapes of the networks: one frozen dataclass a network, and the published sizes. Needs no torch.

A configuration says everything that decides the keys and shapes of a state dict and what the network
computes. `kind` names the network where a configuration is stored as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from shards import Positions, UsageError, read_document
from train.models.flat_config import FlatConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the pixels DINOv2 and MAE see. Source: their Hugging Face image processors."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the pixels DINOv2 and MAE see. Source: their Hugging Face image processors."""


class TransformerSize(NamedTuple):
    """Width, number of blocks and number of attention heads of a stack of transformer blocks."""

    width: int
    depth: int
    num_heads: int


DIT_SIZES = {
    "s": TransformerSize(384, 12, 6),
    "b": TransformerSize(768, 12, 12),
    "l": TransformerSize(1024, 24, 16),
    "xl": TransformerSize(1152, 28, 16),
}
"""DiT's sizes, also of DiT-DH's deep part.

Source: arXiv 2212.09748 table 1; S and XL as published in github:bytetriper/RAE configs/stage2.
"""

DH_HEAD = TransformerSize(2048, 2, 16)
"""DiT-DH's wide shallow head. Source: arXiv 2510.11690 section 5; github:bytetriper/RAE configs/stage2."""

RAEV2_SIZES = {**DIT_SIZES, "xl": TransformerSize(1440, 28, 20)}
"""Sizes of the deep part of RAEv2's transformer; its head is `DH_HEAD`.

XL as published: arXiv 2605.18324, github:nanovisionx/RAEv2 configs/stage2 at 8a0d238; S, B and L are ours.
"""

RAEV2_BASE_DEPTHS = {"s": 3, "b": 3, "l": 7, "xl": 8}
"""Deep blocks after which the base output is read: 8 of 28 as published for XL, the same share in our S, B and L."""

DECODER_SIZES = {
    "b": TransformerSize(768, 12, 12),
    "l": TransformerSize(1024, 24, 16),
    "xl": TransformerSize(1152, 28, 16),
}
"""The ViT decoder's sizes. Source: github:bytetriper/RAE configs/decoder/{ViTB,ViTL,ViTXL}/config.json."""

DECODER_MLP_WIDTHS = {"b": 3072, "l": 4096, "xl": 4096}
"""Hidden width of the decoder's MLPs; XL's is not four times its width. Source: as `DECODER_SIZES`."""


@dataclass(frozen=True, kw_only=True)
class LatentTransformerConfig:
    """Shape of every transformer on latents."""

    token_width: int
    """Channels D of a latent; the encoder's token width."""
    grid: tuple[int, int]
    """Rows and columns (h, w) of the latent."""
    num_classes: int
    """Number of classes; the label `num_classes` itself means no class."""
    width: int
    """Width of the residual stream; of the deep part, where there is a head."""
    depth: int
    """Number of transformer blocks; of the deep part, where there is a head."""
    num_heads: int
    """Attention heads a block; of the deep part, where there is a head."""
    patch_size: int = 1
    """Side of the square of latent positions that becomes one token of the transformer."""
    mlp_ratio: float = 4.0
    """Nominal MLP width over width; SwiGLU takes two thirds of it."""
    positions: Positions = "grid"
    """How positions are encoded: by row and column of a grid, or by the number in a sequence."""
    end_time: bool = False
    """The network also takes the time r at which a jump ends and predicts the average velocity from t to r."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        _check_latent(self.token_width, self.grid, self.patch_size, self.num_classes)
        _check_positions(self.positions, self.grid, self.patch_size)

    @property
    def axes(self) -> int:
        """Axes of the position encoding."""
        return 1 if self.positions == "sequence" else 2

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the transformer's tokens: the latent's grid over the patch size."""
        return self.grid[0] // self.patch_size, self.grid[1] // self.patch_size

    @property
    def patch_values(self) -> int:
        """Numbers in the patch of the latent that becomes one token."""
        return self.patch_size**2 * self.token_width


@dataclass(frozen=True, kw_only=True)
class ModulatedDiTConfig(LatentTransformerConfig):
    """Shape of transformers whose blocks are modulated by time and class (adaLN); the subclass names the network."""

    qk_norm: bool = False
    """Normalise queries and keys a head; steadies training in bfloat16."""
    swiglu: bool = True
    """SwiGLU MLPs; otherwise tanh-GELU."""
    rms_norm: bool = True
    """RMSNorm with weights; otherwise LayerNorm."""
    norm_affine: bool = False
    """Blocks' LayerNorms have a scale and a bias, those of queries and keys a scale alone, as FlatDINO's; otherwise
    the first have neither, the second both and PyTorch's eps, as RAE's."""
    rope: bool = True
    """Rotary position encoding of queries and keys."""
    shift: bool = True
    """Adaptive normalisation shifts as well as scales."""
    null_label: bool = True
    """The label table has the row `num_classes` for no class, which classifier-free guidance needs."""

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        super().__post_init__()
        _check_stack("width", self.width, self.depth, self.num_heads, axes=self.axes if self.rope else 0)

    def mlp_hidden(self, width: int) -> int:
        """Return hidden width of the MLPs of blocks of a width."""
        return swiglu_width(width, self.mlp_ratio) if self.swiglu else int(width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModulatedDiTConfig):
    """Plain latent diffusion transformer in the form of LightningDiT.

    Source: github:bytetriper/RAE src/stage2/models/lightningDiT.py at a4d18c4.
    """

    predict_sigma: bool = False
    """The last layer has a second half, which is dropped (the reference's `learn_sigma`)."""
    mlp_width: int | None = None
    """Hidden width of the MLPs where it is not `mlp_ratio`'s: FlatDINO's L has 2731."""
    kind: Literal["dit"] = "dit"
    """Which network this configures."""

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        super().__post_init__()
        _check_table_width(self.width, self.axes)

    def mlp_hidden(self, width: int) -> int:
        """Return hidden width of the MLPs."""
        return self.mlp_width or super().mlp_hidden(width)


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig(ModulatedDiTConfig):
    """DiT-DH: a deep narrow transformer that conditions a shallow wide one, token by token.

    Source: arXiv 2510.11690 section 5; github:bytetriper/RAE src/stage2/models/DDT.py at a4d18c4.
    """

    head_width: int = DH_HEAD.width
    """Width of the wide head; at least `token_width`, or the head cannot carry a latent's noise."""
    head_depth: int = DH_HEAD.depth
    """Number of blocks of the wide head."""
    head_num_heads: int = DH_HEAD.num_heads
    """Attention heads a block of the wide head."""
    position_table: bool = True
    """Add a position table to the deep part's tokens."""
    learned_table: bool = False
    """The table is learned from nothing, as FlatDINO's; otherwise it is sines and cosines."""
    kind: Literal["dit-dh"] = "dit-dh"
    """Which network this configures."""

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        super().__post_init__()
        axes = self.axes if self.rope else 0
        _check_stack("head_width", self.head_width, self.head_depth, self.head_num_heads, axes=axes)
        if self.position_table and not self.learned_table:
            _check_table_width(self.width, self.axes)


@dataclass(frozen=True, kw_only=True)
class InContextDiTConfig(LatentTransformerConfig):
    """RAEv2's transformer: time and condition are tokens, queries and keys are normalised, nothing else is modulated.

    Source: arXiv 2605.18324; github:nanovisionx/RAEv2 src/stage2/models/{DDT,lightningDiT}.py at 8a0d238.
    """

    head_width: int | None = None
    """Width of the wide head; at least `token_width`, or the head cannot carry a latent. None: the plain form."""
    head_depth: int = DH_HEAD.depth
    """Number of blocks of the wide head."""
    head_num_heads: int = DH_HEAD.num_heads
    """Attention heads a block of the wide head."""
    base_depth: int | None = None
    """Deep blocks after which the base output is read, as internal guidance needs; None: there is none."""
    condition: Literal["label", "text", "frames", "none"] = "label"
    """What the prediction depends on besides the time; the trainer has "label"."""
    num_time_tokens: int = 4
    """Tokens of the time."""
    num_condition_tokens: int = 8
    """Tokens of a label; the most tokens of a text. Other conditions do not use it."""
    num_scale_tokens: int = 0
    """Tokens of a guidance scale; 0: it is no condition."""
    context_width: int | None = None
    """Width of a text encoder's tokens, for text."""
    num_frames: int = 4
    """Frames a next one is predicted from, for frames."""
    num_action_tokens: int = 4
    """Tokens of the movement between frames, for frames."""
    alignment_depth: int | None = None
    """Deep blocks after which a projection of the image tokens is trained to give another encoder's (REPA)."""
    alignment_width: int | None = None
    """Width of that encoder's tokens; None, as of `alignment_depth`: there is no projection."""
    alignment_hidden: int = 2048
    """Hidden width of the projection. Source: arXiv 2410.06940 (REPA)."""
    kind: Literal["in-context-dit"] = "in-context-dit"
    """Which network this configures."""
    null_label: ClassVar[bool] = True
    """The label table has the row `num_classes` for no class."""

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        super().__post_init__()
        _check_stack("width", self.width, self.depth, self.num_heads, axes=self.axes)
        if self.head_width is not None:
            _check_stack("head_width", self.head_width, self.head_depth, self.head_num_heads, axes=self.axes)
        if self.base_depth is not None and not 1 <= self.base_depth <= self.depth:
            raise UsageError(
                f"base_depth must be between 1 and the depth {self.depth}, or None for no base output; "
                f"got {self.base_depth}"
            )
        if (self.alignment_depth is None) != (self.alignment_width is None):
            raise UsageError("alignment_depth and alignment_width are given together or not at all")
        if self.alignment_depth is not None and not 1 <= self.alignment_depth <= self.depth:
            raise UsageError(
                f"alignment_depth must be between 1 and the depth {self.depth}; got {self.alignment_depth}"
            )
        if self.condition == "text" and self.context_width is None:
            raise UsageError(
                "a network conditioned on text needs context_width, the width of the text's tokens"
            )

    @property
    def sequence_length(self) -> int:
        """Tokens of the deep part: of the image, the time, the guidance scale and the condition."""
        image = self.token_grid[0] * self.token_grid[1]
        return image + self.num_time_tokens + self.num_scale_tokens + self._condition_length(image)

    def _condition_length(self, image: int) -> int:
        if self.condition == "frames":
            return self.num_frames * image + self.num_action_tokens + 1
        return 0 if self.condition == "none" else self.num_condition_tokens


@dataclass(frozen=True, kw_only=True)
class ViTDecoderConfig:
    """ViT decoder: raw tokens of the frozen encoder to pixels.

    Source: arXiv 2510.11690 section 3; github:bytetriper/RAE src/stage1/decoders/decoder.py at a4d18c4.
    """

    token_width: int
    """Width D of the encoder's tokens."""
    grid: tuple[int, int]
    """Rows and columns of patches it puts out; tokens on another grid are resized to it."""
    width: int
    """Width of the residual stream."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads a block."""
    mlp_width: int
    """Hidden width of the MLPs."""
    patch_size: int = 16
    """Side in pixels of the patch that one token becomes; 32 makes a 512-pixel image from a 16×16 grid."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the encoder's pixels (RGB), added to what the network puts out."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the encoder's pixels (RGB), multiplied with what the network puts out."""
    pool: tuple[int, int] | None = None
    """Rows and columns of the windows of tokens that a learned map makes one latent of first; None: no pooling."""
    kind: Literal["decoder"] = "decoder"
    """Which network this configures."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse shapes no network can have."""
        _check_positive(token_width=self.token_width, mlp_width=self.mlp_width, patch_size=self.patch_size)
        _check_positive(grid_rows=self.grid[0], grid_columns=self.grid[1])
        _check_stack("width", self.width, self.depth, self.num_heads, axes=0)
        _check_table_width(self.width, axes=2)
        if self.pool is not None and (
            min(self.pool) < 1
            or max(self.pool) < 2
            or any(n % size for n, size in zip(self.grid, self.pool, strict=True))
        ):
            raise UsageError(
                f"pool must divide the grid {self.grid[0]}×{self.grid[1]} into windows of 2 tokens or more; got "
                f"{self.pool[0]}×{self.pool[1]}"
            )

    @property
    def num_patches(self) -> int:
        """Number of patches it puts out."""
        return self.grid[0] * self.grid[1]

    @property
    def output(self) -> Literal["normalised", "image"]:
        """What its last layer puts out: pixels normalised by an encoder's statistics, or the image itself."""
        itself = set(self.pixel_mean) == {0.0} and set(self.pixel_std) == {1.0}
        return "image" if itself else "normalised"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size


GeneratorConfig = DiTConfig | DiTDHConfig | InContextDiTConfig
ModelConfig = GeneratorConfig | ViTDecoderConfig | FlatConfig


def has_base_output(config: ModelConfig) -> bool:
    """Return whether a network has the second output that internal guidance needs."""
    return isinstance(config, InContextDiTConfig) and config.base_depth is not None


def dit_config(size: str, *, token_width: int, grid: tuple[int, int], num_classes: int) -> DiTConfig:
    """Return plain DiT of a published size: "s", "b", "l" or "xl"."""
    stack = DIT_SIZES[size]
    return DiTConfig(token_width=token_width, grid=grid, num_classes=num_classes, **stack._asdict())


def dit_dh_config(size: str, *, token_width: int, grid: tuple[int, int], num_classes: int) -> DiTDHConfig:
    """DiT-DH of a published size, "s", "b", "l" or "xl", with the published head."""
    stack = DIT_SIZES[size]
    return DiTDHConfig(token_width=token_width, grid=grid, num_classes=num_classes, **stack._asdict())


def raev2_config(
    size: str, *, token_width: int, grid: tuple[int, int], num_classes: int
) -> InContextDiTConfig:
    """RAEv2's transformer for labels: "xl" as published, or "s", "b" or "l", which are ours."""
    return InContextDiTConfig(
        token_width=token_width,
        grid=grid,
        num_classes=num_classes,
        head_width=DH_HEAD.width,
        base_depth=RAEV2_BASE_DEPTHS[size],
        **RAEV2_SIZES[size]._asdict(),
    )


def decoder_config(
    size: str, *, token_width: int, grid: tuple[int, int], patch_size: int = 16
) -> ViTDecoderConfig:
    """Return ViT decoder of a published size: "b", "l" or "xl"."""
    stack = DECODER_SIZES[size]
    return ViTDecoderConfig(
        token_width=token_width,
        grid=grid,
        mlp_width=DECODER_MLP_WIDTHS[size],
        patch_size=patch_size,
        **stack._asdict(),
    )


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration as JSON-ready values, `kind` among them.

    `end_time` is written only where it is set, so that files of ordinary networks stay as they were before it existed.
    """
    values = asdict(config)
    if not values.get("end_time"):
        values.pop("end_time", None)
    return values


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Read back what `config_to_dict` wrote, strictly.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.
    """
    kinds: dict[object, type[ModelConfig]] = {
        "dit": DiTConfig,
        "dit-dh": DiTDHConfig,
        "in-context-dit": InContextDiTConfig,
        "decoder": ViTDecoderConfig,
        "flat": FlatConfig,
    }
    kind = kinds.get(values.get("kind"))
    if kind is None:
        raise UsageError(
            f"a model configuration's kind must be one of {', '.join(map(str, kinds))}; "
            f"got {values.get('kind')!r}"
        )
    return read_document(
        json.dumps(values), kind, name=f"the configuration of a {values['kind']}", error=UsageError
    )


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """Return hidden width of a SwiGLU MLP: two thirds of the nominal one, so that its size stays a plain MLP's.

    2048 gives the odd 5461. Source: github:bytetriper/RAE src/stage2/models/lightningDiT.py at a4d18c4.
    """
    return int(2 / 3 * int(width * mlp_ratio))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1; got {value}")


def _check_latent(token_width: int, grid: tuple[int, int], patch_size: int, num_classes: int) -> None:
    _check_positive(token_width=token_width, num_classes=num_classes, patch_size=patch_size)
    _check_positive(grid_rows=grid[0], grid_columns=grid[1])
    if grid[0] % patch_size or grid[1] % patch_size:
        raise UsageError(
            f"patch_size must divide the latent's grid {grid[0]}×{grid[1]}; got {patch_size}: "
            "choose a divisor of both sides, 1 always works"
        )


def _check_positions(positions: Positions, grid: tuple[int, int], patch_size: int) -> None:
    if positions == "sequence" and (grid[0] != 1 or patch_size != 1):
        raise UsageError(
            "a sequence is one row of latents and is not cut into patches; "
            f"got a grid of {grid[0]}×{grid[1]} and patch_size {patch_size}"
        )
    if positions == "grid" and min(grid) == 1 < max(grid):
        raise UsageError(
            f"the position tables of a grid are wrong on {grid[0]}×{grid[1]}: latents in one row are a "
            'sequence; choose positions="sequence"'
        )


def _check_stack(name: str, width: int, depth: int, num_heads: int, *, axes: int) -> None:
    """Refuse a stack of blocks that cannot be; `axes` are those of its rotary encoding, 0 without one."""
    _check_positive(**{name: width, f"{name}'s num_heads": num_heads})
    if depth < 0:
        raise UsageError(f"the depth beside {name} must not be negative; got {depth}")
    if width % num_heads:
        raise UsageError(f"{name} must be a multiple of its number of heads; got {width} and {num_heads}")
    if axes and width // num_heads % (2 * axes):
        raise UsageError(
            f"rotary encoding turns pairs of channels along {axes} {'axes' if axes > 1 else 'axis'}, so an attention "
            f"head's width must be a multiple of {2 * axes}; got {name} {width} / {num_heads} heads = "
            f"{width // num_heads}: choose other numbers or rope=False"
        )


def _check_table_width(width: int, axes: int) -> None:
    if width % (2 * axes):
        raise UsageError(
            f"the position table holds a sine and a cosine for each of {axes} {'axes' if axes > 1 else 'axis'}, so "
            f"the width must be a multiple of {2 * axes}; got {width}"
        )
