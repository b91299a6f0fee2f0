"""One, two, four and fifty steps of a few-step model beside steps of its teacher: images, distances, seconds.

Distances are in the store's own space: the Fréchet distance of Gaussians fitted to single tokens, of all places and
images alike, generated against stored. So they need no feature network, and a model is measured without its decoder.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.generate.labels import chosen_classes
from eval.generate.sampler import LatentSampler
from eval.images.sheets import grid, save_png, to_uint8
from eval.metrics.moments import FeatureMoments, Gaussian
from eval.metrics.results import device_name, versions, write_json
from eval.metrics.set_distances import frechet_distance
from eval.networks.chain import load_chain
from eval.networks.load import (
    Decoder,
    load_dit,
    make_ready,
    require_fitting_guide,
    require_same_encoder,
    set_precision,
)
from eval.settings import FewStepSettings, GridKind
from shards import Store, UsageError, even_spread, open_store
from train.models.config import LatentTransformerConfig
from train.weights.snapshot import Snapshot

FILE_NAME, IMAGE_NAME = "few-step.json", "few-step.png"
_JUDGED_ROWS = 4096
"""Most rows of the store whose tokens are the reference; as many more are measured against them."""


@dataclass(frozen=True)
class Steps:
    """A way of sampling that is compared."""

    who: str
    """student or teacher."""
    kind: GridKind
    points: int
    method: str
    shown: bool = True
    """Whether its images are in the sheet."""


COMPARED = (
    Steps("student", "uniform", 2, "jump"),
    Steps("student", "uniform", 3, "jump"),
    Steps("student", "uniform", 5, "jump"),
    Steps("student", "to-zero", 51, "euler"),
    Steps("teacher", "to-zero", 2, "euler"),
    Steps("teacher", "to-zero", 3, "euler", shown=False),
    Steps("teacher", "to-zero", 5, "euler", shown=False),
    Steps("teacher", "to-zero", 51, "euler"),
)
"""In the order in which they are shown; fifty steps of the student follow u(x, t, t), its velocity."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a way of sampling gave."""

    who: str
    steps: int
    distance: float
    """Fréchet distance of its tokens to the store's."""
    images_per_second: float
    """Sampling alone."""


def compare_steps(settings: FewStepSettings) -> dict[str, Any]:
    """Sample every way, write few-step.json and few-step.png, and print a table.

    Raises:
        UserError: The networks do not belong together or to the store.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(settings.precision)
    store = open_store(settings.store)
    models = {
        who: load_dit(path, device, store, settings.statistics)
        for who, path in (("student", settings.snapshot), ("teacher", settings.teacher))
    }
    decoder = _checked(settings, store, models, device)
    reference, floor = _stored_tokens(store)
    settings.out.mkdir(parents=True, exist_ok=True)
    rows: list[Measured] = []
    images: dict[str, NDArray[np.uint8]] = {}
    for way in COMPARED:
        sampler = _sampler(models[way.who], way, settings)
        tokens, seconds = _tokens(sampler, models[way.who], settings, device)
        moments = FeatureMoments.of(tokens.reshape(-1, tokens.shape[-1]))
        measured = Measured(
            who=way.who,
            steps=way.points - 1,
            distance=frechet_distance(moments.gaussian(), reference),
            images_per_second=len(tokens) / seconds,
        )
        rows.append(measured)
        if way.shown:
            images[f"{way.who}, {measured.steps}"] = _decoded(decoder, tokens[: settings.columns], device)
    result = {
        "student_step": models["student"].meta.step,
        "teacher_step": models["teacher"].meta.step,
        "samples": settings.num_samples,
        "seed": settings.seed,
        "rows": [asdict(row) for row in rows],
        "distance_of_other_stored_tokens": floor,
        "decoder_images_per_second": _decoding_rate(decoder, models["student"], settings, device),
        "device": device_name(device),
        "precision": settings.precision,
        "versions": versions(),
    }
    sheet = grid(np.concatenate(list(images.values())), settings.columns, list(images))
    save_png(sheet, settings.out / IMAGE_NAME)
    write_json(settings.out / FILE_NAME, result)
    print_table(result)
    return result


def print_table(result: dict[str, Any]) -> None:
    """Return the comparison as lines of text."""
    decoding = result["decoder_images_per_second"]
    for row in result["rows"]:
        share = 1 / (1 + decoding / row["images_per_second"])
        print(  # noqa: T201 - what the command is for
            f"{row['who']:8} {row['steps']:3} steps: distance {row['distance']:9.4f}, "
            f"{row['images_per_second']:8.1f} images/s; decoding takes {100 * share:4.1f} % of the time"
        )
    print(f"other stored tokens: distance {result['distance_of_other_stored_tokens']:9.4f}")  # noqa: T201


def _checked(
    settings: FewStepSettings, store: Store, models: dict[str, Snapshot], device: torch.device
) -> Decoder:
    student, teacher = models["student"], models["teacher"]
    config = student.config
    if not isinstance(config, LatentTransformerConfig) or not config.end_time:
        raise UsageError(
            f"{settings.snapshot} is no few-step model; give a snapshot of a stage -cmt, -mfd or -mft, and its teacher "
            "as --teacher"
        )
    require_fitting_guide(student, teacher, settings.teacher)
    latents, what = store.recipe.encoder, f"the store {settings.store}"
    require_same_encoder(student, latents, what=what)
    chain = load_chain(
        settings.decoder,
        settings.compressor,
        device,
        settings.precision,
        latents=latents,
        published_for=latents,
        what=what,
    )
    for snapshot in (student, teacher):
        make_ready(snapshot.model, settings.precision, compiled=settings.compile)
    chain.make_ready(settings.precision, compiled=settings.compile)
    return chain.decoder


def _stored_tokens(store: Store) -> tuple[Gaussian, float]:
    """Return the Gaussian of stored tokens, and the distance of as many other tokens: a lower bound for models."""
    rows = store.valid_rows[even_spread(2 * _JUDGED_ROWS, len(store.valid_rows))]
    if len(rows) < 2:
        raise UsageError(f"{store.path} must hold at least 2 valid rows to be compared with, got {len(rows)}")
    halves = []
    for part in (rows[::2], rows[1::2]):
        reader = store.reader(store.views[0], "tokens")
        stored = np.empty((len(part), *reader.row_shape), reader.dtype)
        reader.read(part, stored)
        halves.append(FeatureMoments.of(store.decode(stored).reshape(-1, store.width)).gaussian())
    return halves[0], frechet_distance(halves[1], halves[0])


def _sampler(snapshot: Snapshot, way: Steps, settings: FewStepSettings) -> LatentSampler:
    config = snapshot.config
    assert isinstance(config, LatentTransformerConfig)
    labelled = bool(snapshot.meta.class_names) or config.num_classes > 1
    return LatentSampler(
        model=snapshot.model,
        latent_shape=(config.token_width, *config.grid),
        num_classes=config.num_classes,
        classes=chosen_classes((), config.num_classes, labelled=labelled),
        seed=settings.seed,
        kind=way.kind,
        points=way.points,
        method=way.method,
        shift_base=snapshot.meta.shift_base,
        prediction=snapshot.meta.prediction,
        time_floor=snapshot.meta.time_floor,
        precision=settings.precision,
    )


def _tokens(
    sampler: LatentSampler, snapshot: Snapshot, settings: FewStepSettings, device: torch.device
) -> tuple[NDArray[np.float32], float]:
    """Return raw tokens float32 [n, N, D] of all samples, and the seconds that sampling them took."""
    assert snapshot.normalizer is not None
    sampler.latents(torch.arange(settings.batch_size, device=device))  # compilers and caches begin here
    began = _now(device)
    parts = [
        snapshot.normalizer.to_tokens(sampler.latents(numbers)).cpu()
        for numbers in torch.split(torch.arange(settings.num_samples, device=device), settings.batch_size)
    ]
    return torch.cat(parts).numpy(), _now(device) - began


def _decoded(decoder: Decoder, tokens: NDArray[np.float32], device: torch.device) -> NDArray[np.uint8]:
    return to_uint8(decoder.pixels(torch.from_numpy(tokens).to(device))).cpu().numpy()


def _decoding_rate(
    decoder: Decoder, snapshot: Snapshot, settings: FewStepSettings, device: torch.device
) -> float:
    """Measure images a second of the decoder alone."""
    assert snapshot.normalizer is not None
    shape = (settings.batch_size, *snapshot.normalizer.variance.shape)
    tokens = snapshot.normalizer.to_tokens(torch.zeros(shape, device=device))
    decoder.pixels(tokens)
    began = _now(device)
    for _ in range(3):
        decoder.pixels(tokens)
    return 3 * settings.batch_size / (_now(device) - began)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
