"""Decode a store and measure what was lost: the steps of `eval/reconstruction.py`, read top to bottom."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.command import warn
from eval.images.sheets import grid, save_png, side_by_side
from eval.images.sources import blocks
from eval.metrics.cautions import reconstruction_cautions
from eval.metrics.extraction import share
from eval.metrics.features import InceptionFeatures
from eval.metrics.reference import load_reference
from eval.metrics.results import device_name, versions, write_json
from eval.metrics.set_distances import frechet_distance
from eval.networks.chain import Chain, load_chain, through
from eval.networks.load import path_digest, require_same_encoder, set_precision
from eval.reconstruct.pairs import POOL, Pairs, PairScorer, PairScores, merged
from eval.settings import ReconstructionSettings
from shards import Store, UserError, even_spread, open_store, require_output_folder
from train.distributed import Team
from train.engine.signals import die_with_launcher
from train.weights.compressor import load_compressor
from train.weights.snapshot import Snapshot

_BATCH_SIZE = {"cuda": 64, "cpu": 16}
_CLASSES_SHOWN = 32


def reconstruct(settings: ReconstructionSettings) -> dict[str, Any]:
    """Decode rows, compare, and write sheets and results. Return, on the leading process, what results.json holds.

    Raises:
        UserError: Store and decoder do not belong together, or the store keeps no images.
    """
    die_with_launcher()
    require_output_folder(settings.out)
    team = Team()
    try:
        with team.locked(settings.out):
            return _reconstruct(settings, team)
    finally:
        team.close()


def _reconstruct(settings: ReconstructionSettings, team: Team) -> dict[str, Any]:
    set_precision(settings.precision)
    store = open_store(settings.store, follow_links=settings.follow_links)
    chain = _load_chain(settings, store, team)
    rows = store.valid_rows
    if not len(rows):
        raise UserError(
            f"a store must hold a valid row to be reconstructed, all images of {settings.store} are unusable; "
            "name another store"
        )
    if settings.rows is not None:
        rows = rows[even_spread(settings.rows, len(rows))]
    recode = through(chain.compressor) if chain.decoder.expand is None else None
    pairs = Pairs(store, chain.decoder, team.device, rounding=settings.rounding, recode=recode)
    began = time.perf_counter()
    scorer = PairScorer(settings, team.device)
    found = score(pairs, rows, scorer, team, settings.batch_size)
    results = {
        "decoder": settings.decoder.name,
        "decoder_sha256": path_digest(settings.decoder),
        "compressor_sha256": None if settings.compressor is None else path_digest(settings.compressor),
        "step": chain.snapshot.meta.step,
        "encoder_id": chain.snapshot.meta.encoder_id,
        "recipe_id": store.recipe.id,
        "num": len(rows),
        "precision": settings.precision,
        "rounding": settings.rounding,
        "device": device_name(team.device),
        "processes": team.world_size,
        "versions": versions(),
        "seconds": time.perf_counter() - began,
        **mean_scores(found),
    }
    if scorer.inception is not None:
        results |= rfid(
            found, scorer.inception, settings.reference, (store.image_size, store.image_size), team
        )
    team.require_lock()
    if team.is_main_process:
        settings.out.mkdir(parents=True, exist_ok=True)
        _render_pairs(found, pairs, settings)
        _render_classes(found, pairs, store, settings)
        write_json(settings.out / "results.json", results)
    return results


def _load_chain(settings: ReconstructionSettings, store: Store, team: Team) -> Chain:
    """Load what decodes the store: latents' own chain, or the decoder of tokens, after a compressor if one is named.

    Raises:
        UserError: A link does not belong to the store.
    """
    encoder, what = store.recipe.encoder, f"the store {store.path}"
    of_tokens = encoder.compressor is None
    chain = load_chain(
        settings.decoder,
        None if of_tokens else settings.compressor,
        team.device,
        settings.precision,
        latents=encoder,
        published_for=encoder,
        output=settings.decoder_output,
        what=what,
    )
    require_image_size(store, chain.snapshot, settings.decoder)
    if not (of_tokens and settings.compressor is not None):
        return chain
    compressor = load_compressor(settings.compressor, team.device)
    compressor.require_fits(encoder, store.recipe.dtype, store.recipe.code, what=what)
    return replace(chain, compressor=compressor)


def require_decoder_of(store: Store, snapshot: Snapshot, path: Path) -> None:
    """Refuse a decoder of another encoder or image size than the store's.

    Raises:
        IdentityMismatchError: It belongs to another encoder.
        UserError: It makes images of another size, or the store keeps none.
    """
    require_same_encoder(snapshot, store.recipe.encoder, f"the store {store.path}")
    require_image_size(store, snapshot, path)


def require_image_size(store: Store, snapshot: Snapshot, path: Path) -> None:
    """Refuse a decoder that makes images of another size than the store's.

    Raises:
        UserError: It does, or the store keeps no images.
    """
    config, size = snapshot.config, store.image_size
    assert config.kind == "decoder"
    if config.image_size != (size, size):
        made = "×".join(map(str, config.image_size))
        raise UserError(
            f"the decoder {path} makes images of {made} pixels and the store's are {size}×{size}; "
            "use the decoder trained from this store"
        )


def score(
    pairs: Pairs, rows: NDArray[np.int64], scorer: PairScorer, team: Team, batch_size: int | None = None
) -> PairScores:
    """Measure rows of a store, the work shared by all processes; each gets the whole result.

    Args:
        pairs: Gives originals and reconstructions.
        rows: Numbers of valid rows, int64 [n].
        scorer: Measures them.
        team: The processes; all must call.
        batch_size: Rows a process decodes together; None: a size that fits small devices.
    """
    start, stop = share(len(rows), team)
    size_at_once = batch_size or _BATCH_SIZE.get(team.device.type, 16)
    with tqdm(
        total=stop - start, desc="reconstructing", unit="image", disable=not team.is_main_process
    ) as progress:
        for first, last in blocks(start, stop, size_at_once):
            batch = rows[first:last]
            scorer.add(batch, *pairs.read(batch))
            progress.update(len(batch))
    return merged(team.gather(scorer.found))


def mean_scores(found: PairScores) -> dict[str, float]:
    """Return means over the images, by name of the metric."""
    return {name: float(np.concatenate(values).mean()) for name, values in found.scores.items()}


def rfid(
    found: PairScores, network: InceptionFeatures, reference: Path | None, size: tuple[int, int], team: Team
) -> dict[str, Any]:
    """Return RFID with what it was computed with, as results.json holds it; empty but on the main process.

    Args:
        found: Features of originals and reconstructions.
        network: Computed them.
        reference: What to compare with instead of the originals.
        size: Height and width of the images.
        team: The processes; all must call.
    """
    count = sum(len(rows) for rows in found.rows)
    kind, reference_count, gaussian = None, None, None
    if reference is not None:
        side = load_reference(reference, size, network, team, features=POOL, manifold=False)
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
        "reference": "originals" if reference is None else reference.name,
        "feature_networks": {network.name: network.digest},
        "warnings": cautions,
    }


def _render_pairs(found: PairScores, pairs: Pairs, settings: ReconstructionSettings) -> None:
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


def _render_classes(found: PairScores, pairs: Pairs, store: Store, settings: ReconstructionSettings) -> None:
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
