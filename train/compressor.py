"""Train a flat compressor on stored tokens: `accelerate launch train/compressor.py [PRESET] --store STORE --out RUN`.

`pipeline add-field STORE --compressor RUN/snapshots/latest.safetensors --name NAME` then writes the latents of all its
rows. Run the same command again to continue. `python train/compressor.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from train.settings.commandline import parse_runs, run
from train.settings.compressor_presets import COMPRESSOR_DEFAULT, COMPRESSOR_PRESETS, compressor_settings
from train.settings.presets import preset_list

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eval.reconstruct.pairs import Pairs
    from shards import Store
    from train.distributed import Team
    from train.models.flat import FlatVAE
    from train.settings.config import CompressorSettings
    from train.tasks.compression import CompressionTask


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    runs = parse_runs(
        arguments,
        preset=compressor_settings,
        default=COMPRESSOR_DEFAULT,
        script="train/compressor.py",
        presets=preset_list(COMPRESSOR_PRESETS),
    )
    # After the command line is read, so that --help and mistakes are answered at once.
    from train.engine.launch import launch

    return launch(runs, build_task, default_views=all_views)


def build_task(settings: CompressorSettings, store: Store, team: Team) -> CompressionTask:
    """Return the network and its loss, on the process's device."""
    from eval.reconstruct.pairs import sheet_writer
    from train.engine.fine_tuning import prepare_network
    from train.engine.held_out import split_rows
    from train.engine.launch import snapshot_meta
    from train.models.build import build_model
    from train.models.dequantize import Dequantizer
    from train.settings.networks import flat_config
    from train.tasks.compression import CompressionTask

    model = build_model(flat_config(settings.model, store))
    prepare_network(model, settings, team, start=settings.init_from)
    _, left_out = split_rows(store.valid_rows, settings.held_out, seed=settings.seed)
    pairs = chain_pairs(settings, store, model, team)
    shown = left_out if len(left_out) else store.valid_rows
    return CompressionTask(
        model,
        settings,
        snapshot_meta(settings, store),
        dequantizer=Dequantizer.of(store).to(team.device),
        render=None if settings.sample_every is None or pairs is None else sheet_writer(pairs, shown, team),
        held_out=held_out_scores(settings, store, model, pairs, left_out, team),
    )


def chain_pairs(settings: CompressorSettings, store: Store, model: FlatVAE, team: Team) -> Pairs | None:
    """Return originals beside what the decoder makes of tokens that went through the network; None without --decoder.

    Raises:
        UserError: The decoder belongs to another encoder than the store, or the store keeps no images.
    """
    if settings.decoder is None:
        return None
    from eval.networks.load import decoder_of, load_decoder
    from eval.reconstruct.pairs import Pairs
    from eval.reconstruct.run import require_decoder_of

    snapshot = load_decoder(settings.decoder, team.device, store.recipe.encoder)
    require_decoder_of(store, snapshot, settings.decoder)
    decoder = decoder_of(snapshot, settings.precision or "fp32")
    return Pairs(store, decoder, team.device, recode=lambda tokens: model.decode(model.encode(tokens)))


def held_out_scores(
    settings: CompressorSettings,
    store: Store,
    model: FlatVAE,
    pairs: Pairs | None,
    rows: NDArray[np.int64],
    team: Team,
) -> Callable[[], dict[str, float]] | None:
    """Return what measures the network on held-out images; None without --evaluate-every."""
    if settings.evaluate_every is None:
        return None
    from shards import even_spread
    from train.tasks.held_out_tokens import HeldOutTokens

    rows = rows[even_spread(settings.evaluation_images, len(rows))]
    tokens = HeldOutTokens(store=store, model=model, rows=rows, team=team)
    images = image_scores(settings, store, pairs, rows, team)
    return lambda: tokens.scores() | images()


def image_scores(
    settings: CompressorSettings, store: Store, pairs: Pairs | None, rows: NDArray[np.int64], team: Team
) -> Callable[[], dict[str, float]]:
    """Return what measures images after network and decoder; it measures nothing without --decoder."""
    if pairs is None:
        return dict
    import torch

    from eval.metrics.set_distances import frechet_distance
    from eval.reconstruct.pairs import PairScorer
    from eval.reconstruct.run import mean_scores, score
    from eval.settings import PairMetric, ReconstructionSettings

    assert settings.decoder is not None
    metrics: tuple[PairMetric, ...] = (
        ("psnr", "ssim") if settings.rfid_weights is None else ("psnr", "ssim", "rfid")
    )
    asked = ReconstructionSettings(
        store=str(settings.store),
        decoder=settings.decoder,
        metrics=metrics,
        feature_weights=settings.rfid_weights or "public",
    )

    @torch.no_grad()
    def scores() -> dict[str, float]:
        scorer = PairScorer(asked, team.device)
        found = score(pairs, rows, scorer, team)
        measured = mean_scores(found)
        if scorer.inception is not None:
            sides = (side.gaussian("pool") for side in (found.originals, found.reconstructions))
            measured["rfid"] = frechet_distance(*sides)
        return {f"held_out_{name}": value for name, value in measured.items()}

    return scores


def all_views(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return the views a compressor is trained on: every one, because latents are made of every one."""
    return views


if __name__ == "__main__":
    run(main)
