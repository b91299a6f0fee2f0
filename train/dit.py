"""Train a diffusion transformer on a store's tokens: `accelerate launch train/dit.py [PRESET] --store STORE --out RUN`.

Run the same command again to continue. `python train/dit.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.commandline import parse, run
from train.presets import DIT_DEFAULT, DIT_PRESETS, dit_settings, preset_list

if TYPE_CHECKING:
    from shards.store import Store
    from train.config import DiTSettings
    from train.distributed import Team
    from train.velocity_task import VelocityTask


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    settings = parse(
        arguments,
        preset=dit_settings,
        default=DIT_DEFAULT,
        script="train/dit.py",
        presets=preset_list(DIT_PRESETS),
    )
    # After the command line is read, so that --help and mistakes are answered at once.
    from train.launch import launch

    return launch(settings, build_task, fields=("tokens",), default_views=center_and_flip)


def build_task(settings: DiTSettings, store: Store, team: Team) -> VelocityTask:
    """The network, its normaliser and its loss, on the process's device."""
    from train.fine_tuning import start_from
    from train.launch import begun, snapshot_meta
    from train.models.build import build_model
    from train.networks import dit_config
    from train.statistics_source import FILE_NAME, latent_normalizer, save_normalizer
    from train.velocity_task import VelocityTask

    assert settings.out is not None
    model = build_model(dit_config(settings.model, store))
    inherited = None
    if settings.init_from is not None and not begun(settings.out):
        inherited = start_from(model, settings.init_from)
    kept = settings.out / FILE_NAME
    normalizer = latent_normalizer(
        store, settings.views or (), published=settings.statistics, inherited=inherited, kept=kept
    )
    if team.leads:
        save_normalizer(kept, normalizer)
    model.recompute_activations = settings.activation_checkpointing
    model.to(team.device)
    if settings.compile:
        model.compile()
    return VelocityTask(model, normalizer.to(team.device), settings, snapshot_meta(settings, store))


def center_and_flip(views: tuple[str, ...]) -> tuple[str, ...]:
    """The views a DiT draws from: the centre crop and its mirror image, as published."""
    return tuple(view for view in ("center", "flip") if view in views) or views


if __name__ == "__main__":
    run(main)
