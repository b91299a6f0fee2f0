"""Decode a store and measure what was lost: the steps of `eval/reconstruction.py`, read top to bottom."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.command import warn
from eval.images.pictures import grid, save_png, side_by_side
from eval.images.sources import blocks, evenly_spread
from eval.metrics.cautions import reconstruction_cautions
from eval.metrics.extraction import share
from eval.metrics.reference import load_reference
from eval.metrics.results import device_name, versions, write_json
from eval.metrics.set_distances import frechet_distance
from eval.networks.load import decoder_of, load_decoder, path_digest, require_same_encoder, set_precision
from eval.reconstruct.pairs import POOL, Judge, Judged, Pairs, merged
from eval.settings import ReconstructionSettings
from shards import Store, UserError, open_store
from train.distributed import Team
from train.engine.signals import die_with_launcher

_BATCH_SIZE = {"cuda": 64, "cpu": 16}
_CLASSES_SHOWN = 32


def reconstruct(settings: ReconstructionSettings) -> dict[str, Any]:
    """Decode rows, compare, draw and write. Returns, on the leading process, what results.json holds.

    Raises:
        UserError: Store and decoder do not belong together, or the store keeps no images.
    """
    die_with_launcher()
    team = Team()
    try:
        return _reconstruct(settings, team)
    finally:
        team.close()


def _reconstruct(settings: ReconstructionSettings, team: Team) -> dict[str, Any]:
    set_precision(settings.precision)
    store = open_store(settings.store)
    snapshot = load_decoder(settings.decoder, team.device, store.recipe.encoder)
    require_same_encoder(snapshot, store.recipe.encoder, f"the store {settings.store}")
    decoder = decoder_of(snapshot, settings.precision)
    size = (store.image_size, store.image_size)
    if decoder.image_size != size:
        made = "×".join(map(str, decoder.image_size))
        raise UserError(
            f"the decoder makes images of {made} pixels and the store's are {size[0]}×{size[1]}; "
            "use the decoder trained from this store"
        )
    rows = store.valid_rows
    if settings.rows is not None:
        rows = rows[evenly_spread(settings.rows, len(rows))]
    pairs = Pairs(store, decoder, team.device, rounding=settings.rounding)
    began = time.perf_counter()
    judge = Judge(settings, team.device)
    start, stop = share(len(rows), team)
    size_at_once = settings.batch_size or _BATCH_SIZE.get(team.device.type, 16)
    with tqdm(
        total=stop - start, desc="reconstructing", unit="image", disable=not team.is_main_process
    ) as progress:
        for first, last in blocks(start, stop, size_at_once):
            batch = rows[first:last]
            judge.add(batch, *pairs.read(batch))
            progress.update(len(batch))
    found = merged(team.gather(judge.found))
    results = {
        "decoder": settings.decoder.name,
        "decoder_sha256": path_digest(settings.decoder),
        "step": snapshot.meta.step,
        "encoder_id": snapshot.meta.encoder_id,
        "recipe_id": store.recipe.id,
        "num": len(rows),
        "precision": settings.precision,
        "rounding": settings.rounding,
        "device": device_name(team.device),
        "processes": team.world_size,
        "versions": versions(),
        "seconds": time.perf_counter() - began,
        **_summary(found),
    }
    if "rfid" in settings.metrics:
        results |= _rfid(found, judge, settings, size, team)
    if team.is_main_process:
        settings.out.mkdir(parents=True, exist_ok=True)
        _draw(found, pairs, settings)
        _draw_classes(found, pairs, store, settings)
        write_json(settings.out / "results.json", results)
    return results


def _summary(found: Judged) -> dict[str, float]:
    return {name: float(np.concatenate(values).mean()) for name, values in found.scores.items()}


def _rfid(
    found: Judged, judge: Judge, settings: ReconstructionSettings, size: tuple[int, int], team: Team
) -> dict[str, Any]:
    assert judge.inception is not None
    count = sum(len(rows) for rows in found.rows)
    kind, reference_count, gaussian = None, None, None
    if settings.reference is not None:
        side = load_reference(settings.reference, size, judge.inception, team, features=POOL, manifold=False)
        kind, reference_count, gaussian = side.kind, side.count, side.gaussians["pool"]
    cautions = reconstruction_cautions(count, kind, reference_count)
    if not team.is_main_process:
        return {}
    for caution in cautions:
        warn(caution)
    return {
        "rfid": frechet_distance(
            gaussian or found.originals.gaussian("pool"), found.reconstructions.gaussian("pool")
        ),
        "reference": "originals" if settings.reference is None else settings.reference.name,
        "feature_networks": {judge.inception.name: judge.inception.digest},
        "warnings": cautions,
    }


def _draw(found: Judged, pairs: Pairs, settings: ReconstructionSettings) -> None:
    """reconstruction.png: the best, median and worst rows by PSNR, each original beside what was made of it."""
    rows = np.concatenate(found.rows)
    order = np.argsort(-np.concatenate(found.scores["psnr"]), kind="stable")
    count = min(settings.page_rows, len(rows))
    middle = (len(rows) - count) // 2
    parts = {
        "best": order[:count],
        "median": order[middle : middle + count],
        "worst": order[len(rows) - count :],
    }
    shown = rows[np.concatenate(list(parts.values()))]
    originals, made = (side.permute(0, 2, 3, 1).cpu().numpy() for side in pairs.read(shown))
    columns = min(4, count)
    lines = -(-count // columns)
    sheets = side_by_side(originals, made)
    if count % columns:
        # Parts begin on a line of their own.
        blank = np.full_like(sheets[:1], 255).repeat(lines * columns - count, axis=0)
        sheets = np.concatenate([piece for part in np.split(sheets, len(parts)) for piece in (part, blank)])
    names = [name if line == 0 else "" for name in parts for line in range(lines)]
    save_png(grid(sheets, columns, names), settings.out / "reconstruction.png")


def _draw_classes(found: Judged, pairs: Pairs, store: Store, settings: ReconstructionSettings) -> None:
    """classes.png: of each of the first classes its median row by PSNR, original beside what was made of it."""
    rows, scores = np.concatenate(found.rows), np.concatenate(found.scores["psnr"])
    labels = store.labels[rows]
    shown = []
    for label in range(min(store.num_classes, _CLASSES_SHOWN)):
        of_class = np.flatnonzero(labels == label)
        if len(of_class):
            ordered = of_class[np.argsort(scores[of_class], kind="stable")]
            shown.append(rows[ordered[len(ordered) // 2]])
    if shown:
        originals, made = (side.permute(0, 2, 3, 1).cpu().numpy() for side in pairs.read(np.array(shown)))
        save_png(grid(side_by_side(originals, made), columns=4), settings.out / "classes.png")
