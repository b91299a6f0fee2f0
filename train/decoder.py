"""Train a decoder from a store's tokens and images.

`accelerate launch train/decoder.py [PRESET] --store STORE --out RUN`

Run the same command again to continue. `python train/decoder.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.commandline import parse, run
from train.presets import DECODER_DEFAULT, DECODER_PRESETS, decoder_settings, preset_list

if TYPE_CHECKING:
    from shards.store import Store
    from train.config import DecoderSettings
    from train.distributed import Team
    from train.reconstruction_task import ReconstructionTask


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    settings = parse(
        arguments,
        preset=decoder_settings,
        default=DECODER_DEFAULT,
        script="train/decoder.py",
        presets=preset_list(DECODER_PRESETS),
    )
    # After the command line is read, so that --help and mistakes are answered at once.
    from train.launch import launch

    return launch(settings, build_task, fields=("tokens", "image"), default_views=crops_or_center)


def build_task(settings: DecoderSettings, store: Store, team: Team) -> ReconstructionTask:
    """The network and its loss, on the process's device."""
    from train.fine_tuning import start_from
    from train.launch import begun, snapshot_meta
    from train.models.build import build_model
    from train.networks import decoder_config
    from train.reconstruction_task import ReconstructionTask

    assert settings.out is not None
    model = build_model(decoder_config(settings.model, store))
    if settings.init_from is not None and not begun(settings.out):
        start_from(model, settings.init_from)
    model.recompute_activations = settings.activation_checkpointing
    model.to(team.device)
    if settings.compile:
        model.compile()
    return ReconstructionTask(model, settings, snapshot_meta(settings, store))


def crops_or_center(views: tuple[str, ...]) -> tuple[str, ...]:
    """The views a decoder draws from: random crops, as published, where the store has any."""
    return tuple(view for view in views if view.startswith("crop")) or ("center",)


if __name__ == "__main__":
    run(main)
