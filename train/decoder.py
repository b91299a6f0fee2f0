"""Train a decoder from a store's tokens and images.

`accelerate launch train/decoder.py [PRESET] --store STORE --out RUN`

Run the same command again to continue. `python train/decoder.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from train.settings.commandline import parse_runs, run
from train.settings.presets import DECODER_DEFAULT, DECODER_PRESETS, decoder_settings, preset_list

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eval.reconstruct.pairs import Pairs
    from shards import Store
    from train.distributed import Team
    from train.models.perceptual import Perceptual
    from train.settings.config import DecoderSettings
    from train.tasks.reconstruction import ReconstructionTask
    from train.weights.compressor import Compressor


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    runs = parse_runs(
        arguments,
        preset=decoder_settings,
        default=DECODER_DEFAULT,
        script="train/decoder.py",
        presets=preset_list(DECODER_PRESETS),
    )
    # After the command line is read, so that --help and mistakes are answered at once.
    from train.engine.launch import launch

    return launch(runs, build_task, default_views=crops_or_center)


def build_task(settings: DecoderSettings, store: Store, team: Team) -> ReconstructionTask:
    """Return the network and its loss, on the process's device."""
    from eval.networks.chain import through
    from eval.networks.load import Decoder
    from eval.reconstruct.pairs import Pairs, sheet_writer
    from shards import UsageError
    from train.engine.fine_tuning import prepare_network
    from train.engine.held_out import split_rows
    from train.engine.launch import snapshot_meta
    from train.engine.stores import epoch_steps
    from train.models.build import build_model
    from train.models.dequantize import Dequantizer
    from train.models.discriminator import Discriminator
    from train.settings.networks import decoder_config
    from train.tasks.adversarial import AdversarialTask
    from train.tasks.frozen_networks import load_dino_features, load_perceptual
    from train.tasks.reconstruction import ReconstructionTask

    model = build_model(decoder_config(settings.model, store, settings.pool))
    prepare_network(model, settings, team, start=settings.init_from)
    trained_rows, left_out = split_rows(store.valid_rows, settings.held_out, seed=settings.seed)
    decoder = Decoder(
        network=model, precision=settings.precision or "fp32", image_size=model.config.image_size
    )
    compressor = reconstructing_compressor(settings, store, team)
    recode = through(compressor)
    pairs = Pairs(store, decoder, team.device, recode=recode)
    shown = left_out if len(left_out) else trained_rows
    sampler = None if settings.sample_every is None else sheet_writer(pairs, shown, team)
    perceptual = None
    if settings.perceptual == "lpips":
        perceptual = load_perceptual(settings.perceptual_weights).to(team.device)
    held_out = held_out_scores(settings, pairs, left_out, perceptual, team)
    meta = snapshot_meta(settings, store)
    stored = Dequantizer.of(store).to(team.device)
    dequantizer = stored if recode is None else lambda tokens: recode(stored(tokens))
    if not settings.adversarial:
        return ReconstructionTask(
            model, settings, meta, sampler, dequantizer=dequantizer, perceptual=perceptual, held_out=held_out
        )
    if team.sharded:
        raise UsageError("the adversarial loss needs the decoder's last layer whole; leave --sharding at ddp")
    features = load_dino_features(settings.discriminator_weights, settings.adversary.size)
    if settings.compile:
        features.compile()
    width, num_maps = features.config.width, len(features.config.key_depths) + 1
    discriminator = Discriminator(width, num_maps, settings.adversary.kernel_size)
    return AdversarialTask(
        model,
        settings,
        meta,
        sampler,
        dequantizer=dequantizer,
        perceptual=perceptual,
        held_out=held_out,
        features=features.to(team.device),
        discriminator=discriminator.to(team.device),
        team=team,
        steps_per_epoch=epoch_steps(settings, store, len(trained_rows)),
    )


def reconstructing_compressor(settings: DecoderSettings, store: Store, team: Team) -> Compressor | None:
    """Return the compressor whose reconstructed tokens the decoder learns from; None without --compressor.

    Raises:
        UserError: It is no compressor, or was not trained on tokens like the store's.
    """
    if settings.compressor is None:
        return None
    from train.weights.compressor import load_compressor

    compressor = load_compressor(settings.compressor, team.device)
    recipe = store.recipe
    compressor.require_fits(recipe.encoder, recipe.dtype, recipe.code, what=f"the store {store}")
    return compressor


def held_out_scores(
    settings: DecoderSettings,
    pairs: Pairs,
    rows: NDArray[np.int64],
    perceptual: Perceptual | None,
    team: Team,
) -> Callable[[], dict[str, float]] | None:
    """Return what measures the decoder on held-out images; None without --evaluate-every.

    Raises:
        IdentityMismatchError: --evaluation-store belongs to another encoder.
        UsageError: its images have another size.
    """
    if settings.evaluate_every is None:
        return None
    from eval.reconstruct.held_out import HeldOutImages
    from shards import UsageError, even_spread, open_store

    if settings.evaluation_store is not None:
        other = open_store(settings.evaluation_store, follow_links=settings.follow_links)
        what = f"--evaluation-store {settings.evaluation_store}"
        pairs.store.recipe.encoder.require_same(other.recipe.encoder, what=what)
        if other.image_size != pairs.store.image_size:
            raise UsageError(
                f"{what} must have images of {pairs.store.image_size} pixels like --store, not {other.image_size}"
            )
        pairs, rows = pairs.of(other), other.valid_rows
    rows = rows[even_spread(settings.evaluation_images, len(rows))]
    return HeldOutImages(pairs=pairs, rows=rows, team=team, perceptual=perceptual).scores


def crops_or_center(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return the views a decoder is trained on: random crops, as published, where the store has any."""
    return tuple(view for view in views if view.startswith("crop")) or ("center",)


if __name__ == "__main__":
    run(main)
