"""From a configuration to the network it describes."""

from __future__ import annotations

from typing import overload

from train.models.config import (
    DiTConfig,
    DiTDHConfig,
    GeneratorConfig,
    InContextDiTConfig,
    ModelConfig,
    ViTDecoderConfig,
)
from train.models.dit import DiT
from train.models.dit_dh import DiTDH
from train.models.flat import FlatVAE
from train.models.flat_config import FlatConfig
from train.models.in_context_dit import InContextDiT, InContextDiTDH
from train.models.vit_decoder import ViTDecoder

Generator = DiT | DiTDH | InContextDiT | InContextDiTDH
"""A diffusion transformer on latents."""


@overload
def build_model(config: GeneratorConfig) -> Generator: ...
@overload
def build_model(config: ViTDecoderConfig) -> ViTDecoder: ...
@overload
def build_model(config: FlatConfig) -> FlatVAE: ...
def build_model(config: ModelConfig) -> Generator | ViTDecoder | FlatVAE:
    """Return the network a configuration describes, freshly initialised, in training mode."""
    if isinstance(config, DiTConfig):
        return DiT(config)
    if isinstance(config, DiTDHConfig):
        return DiTDH(config)
    if isinstance(config, InContextDiTConfig):
        return InContextDiT(config) if config.head_width is None else InContextDiTDH(config)
    if isinstance(config, FlatConfig):
        return FlatVAE(config)
    return ViTDecoder(config)
