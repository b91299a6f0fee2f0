"""From a network's settings and the store it will be trained on to the network's configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Literal

from shards import EncoderIdentity, Store, UsageError
from train.models.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DiTConfig,
    DiTDHConfig,
    GeneratorConfig,
    InContextDiTConfig,
    LatentTransformerConfig,
    ViTDecoderConfig,
)
from train.models.flat_config import FlatConfig, FlatHalfConfig
from train.settings.config import AlignmentSettings, CompressorNetwork, DecoderNetwork, DiTNetwork

LEAST_WIDTH, LEAST_HEAD_WIDTH = 128, 192
"""Narrowest "auto" widths; ours, for stores of narrow tokens."""


def dit_config(network: DiTNetwork, store: Store) -> GeneratorConfig:
    """Return the configuration of the diffusion transformer that fits a store.

    Raises:
        UsageError: the store has another grid or another order than the settings ask for.
    """
    _require_grid(network.grid, store)
    positions = store.recipe.encoder.positions
    if network.positions not in (None, positions):
        raise UsageError(
            f"the preset is for latents on a {network.positions} and those of {store} are on a {positions}; choose "
            "another preset, or --model.positions None to take the store's"
        )
    width = _width(network.width, LEAST_WIDTH, store.width, network.num_heads)
    # A store without labels is trained as one class, whose label is always withheld.
    num_classes = max(1, store.num_classes)
    head_width = (
        None
        if network.head_width is None
        else _width(network.head_width, LEAST_HEAD_WIDTH, store.width, network.head_num_heads)
    )
    shape = LatentTransformerConfig(
        token_width=store.width,
        grid=store.grid,
        num_classes=num_classes,
        width=width,
        depth=network.depth,
        num_heads=network.num_heads,
        patch_size=network.patch_size,
        positions=positions,
    )
    if network.conditioning == "tokens":
        return InContextDiTConfig(
            **vars(shape),
            head_width=head_width,
            head_depth=network.head_depth,
            head_num_heads=network.head_num_heads,
            base_depth=network.base_depth,
        )
    if head_width is None:
        return DiTConfig(**vars(shape), qk_norm=network.qk_norm, mlp_width=network.mlp_width)
    return DiTDHConfig(
        **vars(shape),
        head_width=head_width,
        head_depth=network.head_depth,
        head_num_heads=network.head_num_heads,
        qk_norm=network.qk_norm,
        # As FlatDINO's on sequences; on grids the published table is fixed.
        learned_table=positions == "sequence",
    )


def with_alignment(config: GeneratorConfig, alignment: AlignmentSettings, store: Store) -> GeneratorConfig:
    """Return the configuration with a projection to the tokens of an added field, if one is asked for.

    Raises:
        UsageError: the network has none, or the store no such field, or one on another grid.
    """
    if alignment.field is None:
        return config
    if not isinstance(config, InContextDiTConfig):
        raise UsageError("--repa.field needs --model.conditioning tokens, as presets raev2-* have")
    field = store.field(alignment.field)
    if field.grid != config.token_grid:
        raise UsageError(
            f"--repa.field {alignment.field} has tokens on a {field.grid[0]}×{field.grid[1]} grid and the network on "
            f"{config.token_grid[0]}×{config.token_grid[1]}; add a field of the same grid"
        )
    return replace(
        config,
        alignment_depth=alignment.depth,
        alignment_width=field.width,
        alignment_hidden=alignment.hidden,
    )


def decoder_config(network: DecoderNetwork, store: Store, pool: str | None = None) -> ViTDecoderConfig:
    """Return the configuration of the decoder that makes a store's images of its tokens.

    Raises:
        UsageError: the store has no images, images its grid does not divide, or another grid or patch than asked for.
    """
    if store.recipe.encoder.compressor is not None:
        raise UsageError(
            f"a decoder of pixels takes tokens, and {store} holds latents that a compressor made of them; train it "
            "on the store they were made from, and decode through the compressor: --compressor SNAPSHOT"
        )
    _require_grid(network.grid, store)
    size, grid = store.image_size, store.grid
    if not size:
        raise UsageError(
            "a decoder learns from images and this store has none; encode again with --image-size above 0"
        )
    patch = network.patch_size or size // grid[0]
    if (patch * grid[0], patch * grid[1]) != (size, size):
        raise UsageError(
            f"patches of {patch} pixels on a grid of {grid[0]}×{grid[1]} make {patch * grid[0]}×{patch * grid[1]} "
            f"pixels, but the store's images have {size}×{size}; choose --model.patch-size None or another preset"
        )
    mean, std = pixel_statistics(store.recipe.encoder, network.output)
    return ViTDecoderConfig(
        token_width=store.width,
        grid=grid,
        width=network.width,
        depth=network.depth,
        num_heads=network.num_heads,
        mlp_width=network.mlp_width,
        patch_size=patch,
        pixel_mean=mean,
        pixel_std=std,
        pool=None if pool is None else _window(pool),
    )


def _window(pool: str) -> tuple[int, int]:
    rows, _, columns = pool.partition("x")
    return int(rows), int(columns)


def flat_config(network: CompressorNetwork, store: Store) -> FlatConfig:
    """Return the configuration of the flat compressor that fits a store.

    Raises:
        UsageError: the store holds latents of a compressor already.
    """
    if store.recipe.encoder.compressor is not None:
        raise UsageError(
            f"{store.path} holds latents of a compressor already; train on the store that it was derived from"
        )
    return FlatConfig(
        num_tokens=store.num_tokens,
        token_width=store.width,
        num_latents=network.num_latents,
        latent_width=network.latent_width,
        encoder=FlatHalfConfig(**dataclasses.asdict(network.encoder)),
        decoder=FlatHalfConfig(**dataclasses.asdict(network.decoder)),
    )


def widest_layer(config: GeneratorConfig) -> int:
    """Return the width of the layers that predict the velocity (at least the token's: arXiv 2510.11690 section 4)."""
    return config.width if isinstance(config, DiTConfig) else config.head_width or config.width


def _width(asked: int | Literal["auto"], least: int, token_width: int, num_heads: int) -> int:
    if asked != "auto":
        return asked
    # Rotary encoding needs heads whose width is a multiple of 4.
    unit = 4 * num_heads
    return -(-max(least, token_width) // unit) * unit


def _require_grid(grid: tuple[int, int] | None, store: Store) -> None:
    if grid is not None and grid != store.grid:
        raise UsageError(
            f"the preset is for tokens on a {grid[0]}×{grid[1]} grid and the store's are on {store.grid[0]}×"
            f"{store.grid[1]}; choose another preset, or --model.grid None to take the store's"
        )


def published_output(encoder: EncoderIdentity) -> Literal["normalised", "image"]:
    """Return the output convention of published decoders of an encoder's tokens, which their files do not state.

    RAEv2's encoders are DINOv3, whatever combines several blocks, and those with its conventions; its decoders put out
    the image. RAE's put out normalised pixels.

    Source:
        github:nanovisionx/RAEv2 at 8a0d238 and github:bytetriper/RAE at a4d18c4.
    """
    name = encoder.name.partition("[")[0]
    raev2 = encoder.aggregation is not None or "dinov3" in name or name.endswith(".raev2")
    return "image" if raev2 else "normalised"


def pixel_statistics(
    encoder: EncoderIdentity, output: Literal["normalised", "image"]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation (RGB) that turn what a decoder puts out into the image.

    Args:
        encoder: The encoder; pixels are ImageNet's unless it names others.
        output: See `DecoderNetwork.output`; of the image itself they are 0 and 1.
    """
    if output == "image":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = encoder.preprocessing.get("mean", IMAGENET_MEAN)
    std = encoder.preprocessing.get("std", IMAGENET_STD)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
