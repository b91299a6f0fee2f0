"""Train a decoder from a store's tokens and images.

`accelerate launch train/decoder.py [PRESET] --store STORE --out RUN`

Run the same command again to continue. `python train/decoder.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.commandline import parse, run
from train.presets import DECODER_DEFAULT, DECODER_PRESETS, decoder_settings, preset_list

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shards.store import Store
    from train.config import DecoderSettings
    from train.distributed import Team
    from train.models.vit_decoder import ViTDecoder
    from train.reconstruction_task import ReconstructionTask

SHEET_IMAGES = 8
"""Images of a sheet of reconstructions."""


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
    from shards.errors import UsageError
    from train.adversarial_task import AdversarialTask
    from train.fine_tuning import start_from
    from train.frozen_networks import load_dino_features, load_perceptual
    from train.launch import begun, snapshot_meta
    from train.lr import steps_per_epoch
    from train.models.build import build_model
    from train.models.discriminator import Discriminator
    from train.networks import decoder_config
    from train.reconstruction_task import ReconstructionTask
    from train.stored_tokens import StoredTokens

    assert settings.out is not None
    model = build_model(decoder_config(settings.model, store))
    if settings.init_from is not None and not begun(settings.out):
        start_from(model, settings.init_from)
    model.recompute_activations = settings.activation_checkpointing
    model.to(team.device)
    if settings.compile:
        model.compile()
    meta, sampler = snapshot_meta(settings, store), reconstruction_grid(settings, store, team)
    perceptual = None
    if settings.perceptual == "lpips":
        perceptual = load_perceptual(settings.perceptual_weights).to(team.device)
    stored = StoredTokens.of(store).to(team.device)
    if not settings.adversarial:
        return ReconstructionTask(model, settings, meta, sampler, stored=stored, perceptual=perceptual)
    if team.sharded:
        raise UsageError("the adversarial loss needs the decoder's last layer whole; leave --sharding at ddp")
    features = load_dino_features(settings.discriminator_weights, settings.adversary.size)
    width, num_maps = features.config.width, len(features.config.key_depths) + 1
    discriminator = Discriminator(width, num_maps, settings.adversary.kernel_size)
    return AdversarialTask(
        model,
        settings,
        meta,
        sampler,
        stored=stored,
        perceptual=perceptual,
        features=features.to(team.device),
        discriminator=discriminator.to(team.device),
        team=team,
        steps_per_epoch=steps_per_epoch(len(store.valid_rows), settings.global_batch_size),
    )


def reconstruction_grid(
    settings: DecoderSettings, store: Store, team: Team
) -> Callable[[ViTDecoder, Path], None] | None:
    """Draws fixed images of the store beside their reconstructions; None without --sample-every."""
    if settings.sample_every is None:
        return None
    import numpy as np

    from eval.networks import Decoder
    from eval.pictures import grid, save_png, side_by_side, to_uint8
    from train.stored_tokens import StoredTokens, stored_tensor

    assert settings.views
    rows = store.valid_rows[np.linspace(0, len(store.valid_rows) - 1, SHEET_IMAGES).astype(np.int64)]
    tokens, images = (read_rows(store, settings.views[0], field, rows) for field in ("tokens", "image"))
    held = StoredTokens.of(store)(stored_tensor(tokens, store.recipe.dtype)).to(team.device)

    def draw(model: ViTDecoder, path: Path) -> None:
        decoder = Decoder(
            network=model, precision=settings.precision or "fp32", image_size=model.config.image_size
        )
        drawn = to_uint8(decoder.pixels(held)).cpu().numpy()
        if team.leads:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(side_by_side(images, drawn), SHEET_IMAGES // 2), path)

    return draw


def read_rows(store: Store, view: str, field: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Rows of a field, as stored."""
    import numpy as np

    reader = store.reader(view, field)
    values = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, values)
    return values


def crops_or_center(views: tuple[str, ...]) -> tuple[str, ...]:
    """The views a decoder draws from: random crops, as published, where the store has any."""
    return tuple(view for view in views if view.startswith("crop")) or ("center",)


if __name__ == "__main__":
    run(main)
