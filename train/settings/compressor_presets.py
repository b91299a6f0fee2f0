"""Presets of train/compressor.py: one aligned row each, with the source of its numbers. No torch."""

from __future__ import annotations

from typing import NamedTuple

from shards import UsageError
from train.models.flat_config import FLAT_SIZES, FlatSize
from train.settings.config import CompressorHalf, CompressorNetwork, CompressorSettings
from train.settings.config import OptimizerSettings as Adam

STEPS_PER_EPOCH = 2502
"""Steps of an ImageNet epoch at 512 images, in which the published schedule counts."""

STEPS = 375_341
"""Updates of FlatDINO's variant `long`: ⌊1,281,167 · 150 / 512⌋."""

DECAY_START = 320_297
"""Update at which `long` begins to decay: 22 epochs of 2502 before its end."""


class CompressorRow(NamedTuple):
    """A preset: latents K × F, sizes of the two halves, how it is trained, and its source."""

    num_latents: int
    latent_width: int
    encoder: FlatSize
    decoder: FlatSize
    optimizer: Adam
    batch: int
    steps: int
    source: str


_LONG = Adam(
    schedule="warmup-stable-decay", start_lr=1e-6, lr=1e-4, final_lr=1e-8, hold_epochs=5,
    decay_start_epoch=DECAY_START / STEPS_PER_EPOCH, decay_end_epoch=STEPS / STEPS_PER_EPOCH,
    betas=(0.9, 0.999), weight_decay=0.02, decay_matrices_only=True, clip_norm=10.0,
)  # fmt: skip
_CONSTANT = Adam(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.02, decay_matrices_only=True, clip_norm=10.0)
_SMALL = FlatSize(160, 1, 4, 480)

_PUBLISHED = "noctrog/flatdino@cdd398f long-32-sb-128"
_SHAPES = "arXiv 2602.04873's shapes, trained as flat-32x128"
_OURS = "ours: small images on a CPU"

# fmt: off
COMPRESSOR_PRESETS = {
    #                            K   F    encoder          decoder          optimizer  batch steps  source
    "flat-32x128": CompressorRow(32, 128, FLAT_SIZES["s"], FLAT_SIZES["b"], _LONG,     512,  STEPS, _PUBLISHED),
    "flat-64x128": CompressorRow(64, 128, FLAT_SIZES["s"], FLAT_SIZES["b"], _LONG,     512,  STEPS, _SHAPES),
    "flat-32x64":  CompressorRow(32, 64,  FLAT_SIZES["s"], FLAT_SIZES["b"], _LONG,     512,  STEPS, _SHAPES),
    "flat-tiny":   CompressorRow(8,  16,  _SMALL,          _SMALL,          _CONSTANT, 16,   2000,  _OURS),
}
# fmt: on

COMPRESSOR_DEFAULT = "flat-32x128"


def compressor_settings(name: str) -> CompressorSettings:
    """Return the settings of a preset of train/compressor.py.

    Raises:
        UsageError: there is no preset of this name.
    """
    if name not in COMPRESSOR_PRESETS:
        raise UsageError(f"no preset is called {name!r}; there are {', '.join(COMPRESSOR_PRESETS)}")
    row = COMPRESSOR_PRESETS[name]
    return CompressorSettings(
        model=CompressorNetwork(
            num_latents=row.num_latents,
            latent_width=row.latent_width,
            encoder=CompressorHalf(**row.encoder._asdict()),
            decoder=CompressorHalf(**row.decoder._asdict()),
        ),
        optimizer=row.optimizer,
        # The published compressor has no averages: 0 is the trained weights themselves.
        ema_rates=(0.0,),
        global_batch_size=row.batch,
        max_steps=row.steps,
    )
