"""Decode a store and measure what was lost: the steps of `eval/reconstruction.py`, read top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.cautions import reconstruction_cautions
from eval.command import warn
from eval.feature_pass import FeatureSet, share
from eval.features import FeatureName, InceptionFeatures
from eval.image_sources import blocks, evenly_spread
from eval.metrics import frechet_distance
from eval.networks import Decoder, decoder_of, file_digest, load_decoder, require_same_encoder, set_precision
from eval.perceptual_weights import load_perceptual, lpips
from eval.pictures import grid, save_png, side_by_side, to_uint8
from eval.reference import load_reference
from eval.results import device_name, versions, write_json
from eval.settings import ReconstructionSettings
from eval.similarity import psnr, ssim
from shards.errors import UserError
from shards.store import Store, open_store
from train.distributed import Team
from train.signals import die_with_launcher
from train.stored_tokens import StoredTokens, stored_tensor

_BATCH_SIZE = {"cuda": 64, "cpu": 16}
_POOL: set[FeatureName] = {"pool"}
_CLASSES_SHOWN = 32


@dataclass
class Judged:
    """What one process found out about its rows."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    scores: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    """Metrics of the single pictures, by name."""
    originals: FeatureSet = field(default_factory=FeatureSet)
    reconstructions: FeatureSet = field(default_factory=FeatureSet)


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
        team.leave()


def _reconstruct(settings: ReconstructionSettings, team: Team) -> dict[str, Any]:
    set_precision(settings.precision)
    store = open_store(settings.store)
    snapshot = load_decoder(settings.decoder, team.device)
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
    if settings.num is not None:
        rows = rows[evenly_spread(settings.num, len(rows))]
    pairs = Pairs(store, decoder, team.device, rounding=settings.rounding)
    began = time.perf_counter()
    judge = Judge(settings, team.device)
    start, stop = share(len(rows), team)
    size_at_once = settings.batch_size or _BATCH_SIZE.get(team.device.type, 16)
    with tqdm(total=stop - start, desc="reconstructing", unit="image", disable=not team.leads) as progress:
        for first, last in blocks(start, stop, size_at_once):
            batch = rows[first:last]
            judge.add(batch, *pairs.read(batch))
            progress.update(len(batch))
    found = _merged(team.gather(judge.found))
    results = {
        "decoder": settings.decoder.name,
        "decoder_sha256": file_digest(settings.decoder),
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
    if team.leads:
        settings.out.mkdir(parents=True, exist_ok=True)
        _draw(found, pairs, settings)
        _draw_classes(found, pairs, store, settings)
        write_json(settings.out / "results.json", results)
    return results


class Pairs:
    """Originals of a store beside what the decoder makes of their tokens."""

    def __init__(self, store: Store, decoder: Decoder, device: torch.device, *, rounding: bool) -> None:
        self._tokens = store.reader("center", "tokens")
        self._stored = StoredTokens.of(store).to(device)
        self._images = store.reader("center", "image")
        self._decoder = decoder
        self._device = device
        self._rounding = rounding

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Originals and reconstructions of some rows, uint8 [B, 3, H, W] each, on the device."""
        tokens = np.empty((len(rows), *self._tokens.row_shape), self._tokens.dtype)
        images = np.empty((len(rows), *self._images.row_shape), np.uint8)
        self._tokens.read(rows, tokens)
        self._images.read(rows, images)
        raw = self._stored(stored_tensor(tokens, self._tokens.logical_dtype).to(self._device))
        made = to_uint8(self._decoder.pixels(raw), rounding=self._rounding)
        original = torch.from_numpy(images).to(self._device)
        return original.permute(0, 3, 1, 2), made.permute(0, 3, 1, 2)


class Judge:
    """Measures pairs of pictures, batch by batch."""

    def __init__(self, settings: ReconstructionSettings, device: torch.device) -> None:
        self.found = Judged()
        self._metrics = settings.metrics
        self._perceptual = (
            load_perceptual(settings.lpips_weights, device) if "lpips" in settings.metrics else None
        )
        self.inception = (
            InceptionFeatures(settings.feature_weights, device) if "rfid" in settings.metrics else None
        )

    def add(self, rows: NDArray[np.int64], originals: Tensor, made: Tensor) -> None:
        """Measure a batch, uint8 [B, 3, H, W] each."""
        self.found.rows.append(rows)
        # PSNR also orders the page of best, median and worst.
        scores = {"psnr": psnr(originals, made)}
        if "ssim" in self._metrics:
            scores["ssim"] = ssim(originals, made)
        if self._perceptual is not None:
            scores["lpips"] = lpips(self._perceptual, originals, made)
        for name, values in scores.items():
            self.found.scores.setdefault(name, []).append(values.cpu().numpy())
        if self.inception is not None:
            for side, pictures in ((self.found.originals, originals), (self.found.reconstructions, made)):
                side.add(self.inception.features(pictures), moments=_POOL, keep=set())


def _merged(parts: list[Judged]) -> Judged:
    whole = Judged()
    for part in parts:
        whole.rows.extend(part.rows)
        for name, values in part.scores.items():
            whole.scores.setdefault(name, []).extend(values)
        whole.originals.merge(part.originals)
        whole.reconstructions.merge(part.reconstructions)
    return whole


def _summary(found: Judged) -> dict[str, float]:
    return {name: float(np.concatenate(values).mean()) for name, values in found.scores.items()}


def _rfid(
    found: Judged, judge: Judge, settings: ReconstructionSettings, size: tuple[int, int], team: Team
) -> dict[str, Any]:
    assert judge.inception is not None
    count = sum(len(rows) for rows in found.rows)
    kind, reference_count, gaussian = None, None, None
    if settings.reference is not None:
        side = load_reference(settings.reference, size, judge.inception, team, features=_POOL, manifold=False)
        kind, reference_count, gaussian = side.kind, side.count, side.gaussians["pool"]
    cautions = reconstruction_cautions(count, kind, reference_count)
    if not team.leads:
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
