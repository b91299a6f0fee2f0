"""Generate samples and evaluate them: the steps of `eval/generation.py`, read top to bottom."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.command import warn
from eval.generate.labels import chosen_classes
from eval.generate.plan import GenerationPlan, with_sampler_of
from eval.generate.producer import Producer
from eval.generate.record import generation_record, open_folder
from eval.generate.sampler import LatentSampler
from eval.images.samples import SamplesFile, map_samples
from eval.images.sheets import grid, save_png
from eval.metrics.cautions import generation_cautions, require_published_size
from eval.metrics.extraction import share
from eval.metrics.results import device_name, markdown_table, versions, write_json
from eval.metrics.scoring import compare
from eval.networks.chain import load_chain
from eval.networks.load import (
    load_dit,
    make_ready,
    require_fitting_guide,
    set_precision,
)
from eval.protocols import PROTOCOLS
from eval.settings import GenerationSettings, weights_by_name
from shards import (
    EncoderIdentity,
    Store,
    UsageError,
    open_store,
    replace_atomically,
    require_output_folder,
    usable_cores,
)
from train.distributed import Team
from train.engine.signals import die_with_launcher
from train.models.config import LatentTransformerConfig, has_base_output
from train.models.cost import forward_flops
from train.weights.snapshot import Snapshot, is_snapshot


def generate(plan: GenerationPlan) -> dict[str, Any]:
    """Sample, decode, write and, against a reference, evaluate.

    Returns:
        What results.json holds; complete on the leading process only.

    Raises:
        UserError: Networks, statistics or an earlier run in the same folder do not belong together.
    """
    die_with_launcher()
    require_output_folder(plan.settings.out)
    team = Team()
    try:
        with team.locked(plan.settings.out):
            return _generate(plan, team)
    finally:
        team.close()


def _generate(plan: GenerationPlan, team: Team) -> dict[str, Any]:
    settings = plan.settings
    set_precision(settings.precision)
    _require_use_of_statistics(settings)
    store = None if settings.encoder_of is None else open_store(settings.encoder_of)
    model = load_dit(settings.snapshot, team.device, store, settings.statistics, settings.base_depth)
    plan = with_sampler_of(plan, model.meta.prediction, end_time=_knows_end_time(model))
    producer = _producer(plan, model, store, team)
    require_published_size(settings.protocol, producer.decoder.image_size)
    record = generation_record(plan, producer.sampler, store)
    if team.is_main_process:
        open_folder(settings.out, record)
    samples = SamplesFile(settings.out / "samples.npz", plan.num, producer.decoder.image_size)
    seconds, made = _sample(samples, producer, team)
    results: dict[str, Any] = {
        **record,
        "image_size": list(producer.decoder.image_size),
        "encoder": model.meta.encoder,
        "encoder_id": model.meta.encoder_id,
        "step": model.meta.step,
        "samples_seen": model.meta.samples_seen,
        "ema_rate": model.meta.ema_rate,
        "device": device_name(team.device),
        "processes": team.world_size,
        "versions": versions(),
        "sampled_now": made,
        "sampling_seconds": seconds,
        "images_per_second": made / seconds if made else None,
        "evaluations": producer.sampler.evaluations(),
        "decoder_share_of_flops": decoder_share(model, producer),
    }
    if team.is_main_process:
        images = map_samples(samples.path)
        _render_grid(images, plan, producer.sampler.classes, model.meta.class_names)
    if plan.reference is not None:
        results |= _evaluate(samples.path, plan.reference, plan, team)
    team.require_lock()
    if team.is_main_process:
        write_json(settings.out / "results.json", results)
        if settings.protocol is not None:
            _write_table(plan, results)
    return results


def _require_use_of_statistics(settings: GenerationSettings) -> None:
    dits = [path for path in (settings.snapshot, settings.guide) if path is not None]
    if settings.statistics is not None and all(is_snapshot(path) for path in dits):
        raise UsageError(
            f"--statistics is for a published DiT, {settings.snapshot} is a snapshot and holds its own; "
            "leave --statistics out"
        )


def _producer(plan: GenerationPlan, model: Snapshot, store: Store | None, team: Team) -> Producer:
    settings = plan.settings
    chain = load_chain(
        settings.decoder,
        settings.compressor,
        team.device,
        settings.precision,
        latents=EncoderIdentity.from_dict(model.meta.encoder),
        published_for=None if store is None else store.recipe.encoder,
        output=settings.decoder_output,
        what=f"the DiT {settings.snapshot}",
    )
    guide = None
    if settings.guide is not None:
        guide = load_dit(settings.guide, team.device, store, settings.statistics)
        require_fitting_guide(model, guide, settings.guide)
    config = model.config
    assert isinstance(config, LatentTransformerConfig)
    if plan.guidance == "cfg" and not config.null_label:
        raise UsageError(
            "classifier-free guidance needs a model trained with label dropout, this snapshot has no null label"
        )
    if (plan.guidance == "internal" or settings.internal_scale is not None) and not has_base_output(config):
        raise UsageError(
            f"internal guidance needs a model with a base output, as presets raev2-* train; {settings.snapshot} is none"
        )
    if plan.method == "jump" and not _knows_end_time(model):
        raise UsageError(
            f"a jump needs a model that takes its end, as the stages -cmt, -mfd and -mft train; "
            f"{settings.snapshot} is none: give --sampler euler-50"
        )
    labelled = bool(model.meta.class_names) or config.num_classes > 1
    classes = chosen_classes(settings.classes, config.num_classes, labelled=labelled)
    chain.make_ready(settings.precision, compiled=settings.compile)
    for network in (model, guide):
        if network is not None:
            make_ready(network.model, settings.precision, compiled=settings.compile)
    sampler = LatentSampler(
        model=model.model,
        guide=None if guide is None else guide.model,
        latent_shape=(config.token_width, *config.grid),
        num_classes=config.num_classes,
        classes=classes,
        labels=plan.labels,
        seed=settings.seed,
        kind=plan.kind,
        points=plan.points,
        method=plan.method,
        shift_base=settings.shift_base or model.meta.shift_base,
        guidance=plan.guidance,
        scale=plan.guidance_scale,
        interval=plan.guidance_interval,
        internal_scale=settings.internal_scale,
        internal_interval=settings.internal_interval,
        unconditional_scale=settings.unconditional_scale,
        prediction=model.meta.prediction,
        time_floor=model.meta.time_floor,
        precision=settings.precision,
        halves="separate" if settings.compile else "joined",
    )
    assert model.normalizer is not None
    return Producer(
        sampler=sampler,
        normalizer=model.normalizer,
        decoder=chain.decoder,
        device=team.device,
        batch_size=settings.batch_size,
        fill_batches=settings.compile,
        rounding=settings.rounding,
    )


def _knows_end_time(model: Snapshot) -> bool:
    return isinstance(model.config, LatentTransformerConfig) and model.config.end_time


def decoder_share(model: Snapshot, producer: Producer) -> float:
    """Return the decoder's share of an image's multiplications, which is large with few sampling steps."""
    sampling = producer.sampler.evaluations() * forward_flops(model.config)
    return producer.decoder.flops / (sampling + producer.decoder.flops)


def _sample(samples: SamplesFile, producer: Producer, team: Team) -> tuple[float, int]:
    """Make the samples that are missing; returns seconds and how many."""
    if team.is_main_process:
        if samples.finished:
            samples.drop_unfinished()
        else:
            samples.create()
    team.wait()
    if samples.finished:
        return 0.0, 0
    pending = samples.pending()
    # Nobody writes before everybody has seen the same samples missing.
    team.wait()
    start, stop = share(len(pending), team)
    began = time.perf_counter()
    with (
        samples,
        tqdm(total=stop - start, desc="sampling", unit="image", disable=not team.is_main_process) as progress,
    ):
        producer.produce(pending[start:stop], samples.write, progress)
    team.require_lock()
    seconds = time.perf_counter() - began
    if team.is_main_process:
        samples.finish()
    team.wait()
    return seconds, len(pending)


def _render_grid(
    images: NDArray[np.uint8], plan: GenerationPlan, classes: tuple[int, ...], known: tuple[str, ...]
) -> None:
    """grid.png: with equal labels one row a class under its name, otherwise the first samples in order."""
    settings = plan.settings
    each = len(images) // len(classes)
    if plan.labels == "equal" and each > 0:
        rows, columns = min(len(classes), settings.grid_rows), min(each, settings.grid_columns)
        numbers = np.arange(rows)[:, None] + np.arange(columns) * len(classes)
        names = [known[label] if label < len(known) else "" for label in classes[:rows]]
    else:
        columns = min(settings.grid_columns, len(images))
        numbers = np.arange(min(len(images), columns * settings.grid_rows))
        names = []
    save_png(grid(images[numbers.ravel()], columns, names if any(names) else ()), settings.out / "grid.png")
    if settings.pngs:
        folder = settings.out / "png"
        folder.mkdir(exist_ok=True)
        paths = (folder / f"{number:06}.png" for number in range(len(images)))
        with ThreadPoolExecutor(
            usable_cores()
        ) as threads:  # Pillow compresses without the interpreter's lock
            list(threads.map(save_png, images, paths))


def _evaluate(samples: Path, reference: Path, plan: GenerationPlan, team: Team) -> dict[str, Any]:
    settings = plan.settings
    began = time.perf_counter()
    comparison = compare(
        samples,
        reference,
        plan.metrics,
        team,
        weights={
            "inception": settings.feature_weights,
            "dinov2": settings.dinov2_weights,
            **weights_by_name(settings.representation_weights),
        },
    )
    cautions = comparison.cautions + generation_cautions(
        plan.num, comparison.reference_kind, comparison.reference_count, settings.protocol, reference.name
    )
    if team.is_main_process:
        for caution in cautions:
            warn(caution)
    return {
        "metrics": comparison.metrics,
        "reference": {
            "name": reference.name,
            "kind": comparison.reference_kind,
            "count": comparison.reference_count,
        },
        "feature_networks": comparison.networks,
        "warnings": cautions,
        "evaluation_seconds": time.perf_counter() - began,
    }


def _write_table(plan: GenerationPlan, results: dict[str, Any]) -> None:
    settings = plan.settings
    assert settings.protocol is not None
    changes = f"; {', '.join(plan.deviations)}" if plan.deviations else ""
    table = markdown_table(
        PROTOCOLS[settings.protocol].published,
        settings.snapshot.stem + ("" if results["step"] is None else f", step {results['step']}"),
        results["metrics"],
        f"this run, {plan.num} samples{changes}",
    )
    replace_atomically(settings.out / "table.md", table.encode())
