"""What a network costs: parameters and multiplications, by arithmetic on its configuration. Needs no torch.

A multiplication with its addition counts as two FLOPs; norms, activations and other elementwise work, a percent or
two, count as none, as is usual (torch.utils.flop_counter counts so too).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from train.models.config import (
    DiTConfig,
    DiTDHConfig,
    GeneratorConfig,
    InContextDiTConfig,
    ModelConfig,
    ModulatedDiTConfig,
    ViTDecoderConfig,
    swiglu_width,
)
from train.models.flat_config import FlatConfig, FlatHalfShape

NUM_FREQUENCIES = 256
"""Frequencies of the time embedding, as in `train.models.embeddings.TimeEmbedding`."""


class _Linear(NamedTuple):
    """A linear layer, or a convolution of patches, and how often it is applied for one image."""

    inputs: int
    outputs: int
    times: int
    bias: bool = True

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)

    @property
    def multiplications(self) -> int:
        return self.inputs * self.outputs * self.times


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a network, with its position tables and time frequencies."""
    return sum(linear.parameters for linear in _linears(config)) + _other_parameters(config)


def forward_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one forward pass for one image; a training step takes about three times that."""
    if isinstance(config, FlatConfig):
        return flat_half_flops(config.encoder_shape) + flat_half_flops(config.decoder_shape)
    return _flops(_linears(config), _attentions(config))


def flat_half_flops(shape: FlatHalfShape) -> int:
    """Return the FLOPs of one forward pass of one half of a flat compressor, for one image."""
    return _flops(_flat_linears(shape), _flat_attentions(shape))


def _flops(linears: Iterable[_Linear], attentions: Iterable[tuple[int, int]]) -> int:
    # Scores and weighted values: two products of tokens × tokens × width in each block.
    attention = sum(2 * tokens**2 * width for tokens, width in attentions)
    return 2 * (sum(linear.multiplications for linear in linears) + attention)


def _linears(config: ModelConfig) -> Iterator[_Linear]:
    if isinstance(config, ViTDecoderConfig):
        yield from _decoder_linears(config)
        return
    if isinstance(config, FlatConfig):
        yield from _flat_linears(config.encoder_shape)
        yield from _flat_linears(config.decoder_shape)
        return
    if isinstance(config, InContextDiTConfig):
        yield from _in_context_linears(config)
        return
    tokens, width = config.token_grid[0] * config.token_grid[1], config.width
    patch_values = config.patch_size**2 * config.token_width
    for _ in range(2 if config.end_time else 1):
        yield from _scalar_linears(width)
    yield _Linear(patch_values, width, tokens)
    for _ in range(config.depth):
        yield from _block_linears(config, width, tokens, conditions=1)
    if isinstance(config, DiTConfig):
        yield _Linear(width, 2 * width, 1)
        yield _Linear(width, patch_values * (2 if config.predict_sigma else 1), tokens)
        return
    head = config.head_width
    if width != head:
        yield _Linear(width, head, tokens)
    yield _Linear(patch_values, head, tokens)
    for _ in range(config.head_depth):
        # The head is conditioned token by token, so its modulations are computed for every token.
        yield from _block_linears(config, head, tokens, conditions=tokens)
    yield _Linear(head, 2 * head, tokens)
    yield _Linear(head, patch_values, tokens)


def _block_linears(
    config: ModulatedDiTConfig, width: int, tokens: int, *, conditions: int
) -> Iterator[_Linear]:
    yield _Linear(width, (6 if config.shift else 4) * width, conditions)
    yield _Linear(width, 3 * width, tokens)
    yield _Linear(width, width, tokens)
    hidden = config.mlp_hidden(width)
    yield _Linear(width, 2 * hidden if config.swiglu else hidden, tokens)
    yield _Linear(hidden, width, tokens)


def _in_context_linears(config: InContextDiTConfig) -> Iterator[_Linear]:
    image, width, head = config.token_grid[0] * config.token_grid[1], config.width, config.head_width
    yield from _scalar_linears(width)
    if config.end_time:
        yield from _scalar_linears(width)
    if config.num_scale_tokens:
        yield from _scalar_linears(width)
    if config.condition == "text" and config.context_width is not None:
        yield _Linear(config.context_width, width, config.num_condition_tokens)
    if config.condition == "frames":
        yield _Linear(config.patch_values, width, config.num_frames * image)
        yield _Linear(3, width, 1)
        yield from _scalar_linears(width)
    yield _Linear(config.patch_values, width, image)
    for _ in range(config.depth):
        yield from _plain_block_linears(width, config.mlp_ratio, config.sequence_length)
    if head is not None:
        if width != head:
            yield _Linear(width, head, image)
        yield _Linear(config.patch_values, head, image)
        for _ in range(config.head_depth):
            yield _Linear(head, 6 * head, image)
            yield from _plain_block_linears(head, config.mlp_ratio, image)
    yield from _alignment_linears(config)
    for output_width in (head or width, width)[: 1 if config.base_depth is None else 2]:
        if head is not None:
            yield _Linear(output_width, 2 * output_width, image)
        yield _Linear(output_width, config.patch_values, image)


def _alignment_linears(config: InContextDiTConfig) -> Iterator[_Linear]:
    if config.alignment_width is not None:
        image = config.token_grid[0] * config.token_grid[1]
        for inputs, outputs in itertools.pairwise(
            (config.width, config.alignment_hidden, config.alignment_hidden, config.alignment_width)
        ):
            yield _Linear(inputs, outputs, image)


def _scalar_linears(width: int) -> Iterator[_Linear]:
    """Return the linear layers of the embedding of a time or of another scalar."""
    yield _Linear(2 * NUM_FREQUENCIES, width, 1)
    yield _Linear(width, width, 1)


def _plain_block_linears(width: int, mlp_ratio: float, tokens: int) -> Iterator[_Linear]:
    """Return the linear layers of a block without modulation."""
    hidden = swiglu_width(width, mlp_ratio)
    yield _Linear(width, 4 * width, tokens)
    yield _Linear(width, 2 * hidden, tokens)
    yield _Linear(hidden, width, tokens)


def _decoder_linears(config: ViTDecoderConfig) -> Iterator[_Linear]:
    tokens, width = config.num_patches + 1, config.width
    if config.pool is not None:
        size = config.pool[0] * config.pool[1]
        yield _Linear(size * config.token_width, config.token_width, config.num_patches // size)
    yield _Linear(config.token_width, width, config.num_patches)
    for _ in range(config.depth):
        for _ in ("query", "key", "value", "output"):
            yield _Linear(width, width, tokens)
        yield _Linear(width, config.mlp_width, tokens)
        yield _Linear(config.mlp_width, width, tokens)
    yield _Linear(width, 3 * config.patch_size**2, config.num_patches)


def _attentions(config: GeneratorConfig | ViTDecoderConfig) -> list[tuple[int, int]]:
    """Return number of tokens and width of each attention."""
    if isinstance(config, ViTDecoderConfig):
        return [(config.num_patches + 1, config.width)] * config.depth
    tokens = config.token_grid[0] * config.token_grid[1]
    sequence = config.sequence_length if isinstance(config, InContextDiTConfig) else tokens
    deep = [(sequence, config.width)] * config.depth
    if isinstance(config, DiTConfig) or config.head_width is None:
        return deep
    return deep + [(tokens, config.head_width)] * config.head_depth


def _other_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of norms, tables and all else that is no linear layer."""
    if isinstance(config, ViTDecoderConfig):
        norms = (2 * config.depth + 1) * 2 * config.width
        return norms + (config.num_patches + 1) * config.width + config.width
    if isinstance(config, FlatConfig):
        return sum(_flat_other_parameters(shape) for shape in (config.encoder_shape, config.decoder_shape))
    if isinstance(config, InContextDiTConfig):
        return _in_context_others(config)
    tokens = config.token_grid[0] * config.token_grid[1]
    labels = (config.num_classes + config.null_label) * config.width
    table = 0 if isinstance(config, DiTDHConfig) and not config.position_table else tokens * config.width
    stacks = [(config.width, config.depth, config.num_heads)]
    if isinstance(config, DiTDHConfig):
        stacks.append((config.head_width, config.head_depth, config.head_num_heads))
    norms = stacks[-1][0] if config.rms_norm else 0
    for width, depth, num_heads in stacks:
        norms += depth * 2 * width * (1 if config.rms_norm else 2 if config.norm_affine else 0)
        if config.qk_norm:
            norms += depth * (2 if config.rms_norm or config.norm_affine else 4) * (width // num_heads)
    return NUM_FREQUENCIES * (2 if config.end_time else 1) + labels + table + norms


def _flat_linears(shape: FlatHalfShape) -> Iterator[_Linear]:
    config, width, length = shape.config, shape.config.width, shape.length
    if shape.inputs != width:
        yield _Linear(shape.inputs, width, shape.num_inputs, bias=False)
    for _ in range(config.depth):
        yield _Linear(width, 3 * width, length)
        yield _Linear(width, width, length)
        yield _Linear(width, config.mlp_width * (2 if config.swiglu else 1), length)
        yield _Linear(config.mlp_width, width, length)
    if shape.outputs != width:
        yield _Linear(width, shape.outputs, length, bias=False)


def _flat_attentions(shape: FlatHalfShape) -> list[tuple[int, int]]:
    return [(shape.length, shape.config.width)] * shape.config.depth


def _flat_other_parameters(shape: FlatHalfShape) -> int:
    config, width = shape.config, shape.config.width
    tokens = shape.first_query + shape.num_queries + (shape.num_inputs if shape.positions else 0)
    norms = (2 * config.depth + 1) * 2 * width + config.depth * 2 * (width // config.num_heads)
    return tokens * width + norms


def _in_context_others(config: InContextDiTConfig) -> int:
    width, head = config.width, config.head_width
    frames, text = config.condition == "frames", config.condition == "text"
    scalars = 1 + config.end_time + bool(config.num_scale_tokens) + frames
    learned = config.num_time_tokens + config.num_scale_tokens
    if config.condition == "label":
        learned += config.num_condition_tokens + config.num_classes + 1
    if frames:
        learned += config.num_action_tokens + 1
    norms = config.depth * (2 * width + 2 * (width // config.num_heads))
    if head is not None:
        norms += config.head_depth * (2 * head + 2 * (head // config.head_num_heads))
    norms += (head or width) + (0 if config.base_depth is None else width)
    if text and config.context_width is not None:
        norms += config.context_width
    return scalars * NUM_FREQUENCIES + learned * width + norms
