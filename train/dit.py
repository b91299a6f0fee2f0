"""Train a diffusion transformer on a store's tokens: `accelerate launch train/dit.py [PRESET] --store STORE --out RUN`.

Run the same command again to continue. `python train/dit.py --help` lists the presets and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.settings.commandline import parse_runs, run
from train.settings.few_step import require_start
from train.settings.presets import DIT_DEFAULT, DIT_PRESETS, dit_settings, preset_list

if TYPE_CHECKING:
    from eval.generate.sampler import LatentSampler
    from eval.networks.load import Decoder
    from shards import Store
    from train.distributed import Team
    from train.engine.task import Task
    from train.models.build import Generator
    from train.models.normalizer import LatentNormalizer
    from train.settings.config import DiTSettings

SHEET_CLASSES, SHEET_COLUMNS = 8, 6
"""Rows and columns of a sheet of samples."""


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    runs = parse_runs(
        arguments,
        preset=dit_settings,
        default=DIT_DEFAULT,
        script="train/dit.py",
        presets=preset_list(DIT_PRESETS),
    )
    for settings in runs:
        require_start(settings)
    # After the command line is read, so that --help and mistakes are answered at once.
    from train.engine.launch import launch

    return launch(runs, build_task, default_views=center_and_flip)


def build_task(settings: DiTSettings, store: Store, team: Team) -> Task:
    """Return the network, its normaliser and its objective, on the process's device."""
    from train.engine.fine_tuning import prepare_network
    from train.engine.launch import snapshot_meta
    from train.engine.statistics_source import FILE_NAME, latent_normalizer, save_normalizer
    from train.models.build import build_model
    from train.models.dequantize import Dequantizer
    from train.models.embeddings import initialise_as_published
    from train.settings.networks import dit_config, with_alignment
    from train.tasks.objectives import OBJECTIVES
    from train.tasks.parts import DiTParts

    assert settings.out is not None
    config = with_alignment(dit_config(settings.model, store), settings.repa, store)
    model = build_model(replace(config, end_time=settings.learns_jumps))
    if model.r_embedder is not None and settings.end_time_init == "published":
        initialise_as_published(model.r_embedder)
    if settings.train_tables:
        model.requires_grad_(True)  # noqa: FBT003 - torch's own signature
    if settings.head_residual == "bfloat16":
        model.x_embedder.keeps_type = True
    # A teacher's prediction is compared where it is loaded.
    prediction = settings.flow.prediction if settings.init_from else None
    start = settings.init_from or settings.teacher
    inherited = prepare_network(model, settings, team, start=start, prediction=prediction)
    kept = settings.out / FILE_NAME
    normalizer = latent_normalizer(
        store, settings.views or (), published=settings.statistics, inherited=inherited, kept=kept
    )
    if team.is_main_process:
        save_normalizer(kept, normalizer)
    decoder = sample_decoder(settings, store, team)
    parts = DiTParts(
        settings=settings,
        model=model,
        normalizer=normalizer.to(team.device),
        dequantizer=Dequantizer.of(store).to(team.device),
        snapshot_meta=snapshot_meta(settings, store),
        store=store,
        team=team,
        render=sample_grid(settings, store, decoder, team),
        fid=small_sample_fid(settings, store, decoder, team),
    )
    return OBJECTIVES[settings.objective](parts)


def sample_decoder(settings: DiTSettings, store: Store, team: Team) -> Decoder | None:
    """Return what renders samples of the network, through a compressor if need be; None if none are asked for.

    Raises:
        UserError: There is none, or it does not belong to the store's latents.
    """
    asked = [name for name in ("sample_every", "fid_every") if getattr(settings, name) is not None]
    if not asked:
        return None
    from eval.networks.chain import load_chain
    from shards import UsageError

    if settings.decoder is None:
        name = asked[0].replace("_", "-")
        raise UsageError(f"--{name} needs a decoder: give --decoder SNAPSHOT")
    encoder = store.recipe.encoder
    return load_chain(
        settings.decoder,
        settings.compressor,
        team.device,
        settings.precision or "fp32",
        latents=encoder,
        published_for=encoder,
        what=f"the store {store}",
    ).decoder


def sample_grid(
    settings: DiTSettings, store: Store, decoder: Decoder | None, team: Team
) -> Callable[[Generator, LatentNormalizer, Path], None] | None:
    """Return what writes a sheet of images, a row a class, of the same noise each time; None without --sample-every."""
    if settings.sample_every is None or decoder is None:
        return None
    import torch

    from eval.generate.labels import chosen_classes
    from eval.images.sheets import grid, save_png, to_uint8

    classes = chosen_classes((), max(1, store.num_classes), labelled=store.num_classes > 0)[:SHEET_CLASSES]
    # Sample i shows class i modulo the number of classes; the sheet has a row a class.
    numbers = torch.arange(len(classes) * SHEET_COLUMNS).view(SHEET_COLUMNS, len(classes)).T.flatten()

    def render(model: Generator, normalizer: LatentNormalizer, path: Path) -> None:
        latents = latent_sampler(settings, model, classes).latents(numbers.to(team.device))
        images = to_uint8(decoder.pixels(normalizer.to_tokens(latents))).cpu().numpy()
        if team.is_main_process:
            names = [store.class_names[label] for label in classes if store.class_names]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(images, SHEET_COLUMNS, names), path)

    return render


def small_sample_fid(
    settings: DiTSettings, store: Store, decoder: Decoder | None, team: Team
) -> Callable[[Generator, LatentNormalizer], float] | None:
    """Return what measures the FID of samples of all classes, the same noise each time; None without --fid-every."""
    if settings.fid_every is None or decoder is None:
        return None
    from eval.generate.labels import chosen_classes
    from eval.generate.small_sample import SmallSampleFid
    from eval.metrics.features import InceptionFeatures

    assert settings.fid_reference is not None
    network = InceptionFeatures(settings.fid_weights, team.device)
    fid = SmallSampleFid(decoder, settings.fid_reference, network, team, num=settings.fid_samples)
    classes = chosen_classes((), max(1, store.num_classes), labelled=store.num_classes > 0)
    return lambda model, normalizer: fid(latent_sampler(settings, model, classes), normalizer)


def latent_sampler(settings: DiTSettings, model: Generator, classes: tuple[int, ...]) -> LatentSampler:
    """Return a sampler of the classes' latents with the seed, time shift and arithmetic of the training."""
    from eval.generate.sampler import LatentSampler

    config = model.config
    return LatentSampler(
        model=model,
        latent_shape=(config.token_width, *config.grid),
        num_classes=config.num_classes,
        shift_base=settings.flow.shift_base,
        classes=classes,
        seed=settings.seed,
        precision=settings.precision or "fp32",
        **_steps_of(settings),
        prediction=settings.flow.prediction,
        time_floor=settings.flow.time_floor,
    )


def _steps_of(settings: DiTSettings) -> dict[str, Any]:
    """Return how a network is sampled while it trains: in one jump, if it learns to jump."""
    if settings.learns_jumps:
        return {"kind": "uniform", "points": 2, "method": "jump"}
    return {"kind": "to-zero" if settings.flow.prediction == "x" else "published"}


def center_and_flip(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return the views a DiT is trained on: the centre crop and its mirror image, as published."""
    return tuple(view for view in ("center", "flip") if view in views) or views


if __name__ == "__main__":
    run(main)
