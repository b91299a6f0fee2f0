"""What the samples in a folder depend on, kept beside them: a continued run must agree."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from eval.generate.plan import GenerationPlan
from eval.generate.sampler import LatentSampler
from eval.metrics.results import write_json
from eval.networks.load import path_digest
from shards import Store, UserError, read_document

FILE_NAME = "generation.json"

_LATER: dict[str, Any] = {"internal_interval": [0.0, 1.0]}
"""What older records do not say and what was so then; whatever else they do not say was nothing."""


_MOST_NAMED = 8
"""Differences that an error names."""


def generation_record(plan: GenerationPlan, sampler: LatentSampler, store: Store | None) -> dict[str, Any]:
    """Return everything the samples depend on, as JSON values."""
    settings = plan.settings
    record = {
        "snapshot": settings.snapshot.name,
        "snapshot_sha256": path_digest(settings.snapshot),
        "decoder_sha256": path_digest(settings.decoder),
        "compressor_sha256": None if settings.compressor is None else path_digest(settings.compressor),
        "guide_sha256": None if settings.guide is None else path_digest(settings.guide),
        "encoder_of": None if store is None else store.recipe.id,
        "statistics_sha256": None if settings.statistics is None else path_digest(settings.statistics),
        "protocol": settings.protocol,
        "seed": settings.seed,
        "classes": sampler.classes,
        "guidance_interval": plan.guidance_interval,
        "internal_scale": settings.internal_scale,
        "internal_interval": settings.internal_interval,
        "unconditional_scale": settings.unconditional_scale,
        "base_depth": settings.base_depth,
        "precision": settings.precision,
        "rounding": settings.rounding,
        "num": plan.num,
        "labels": plan.labels,
        "kind": plan.kind,
        "points": plan.points,
        "method": plan.method,
        "shift_base": sampler.shift_base,
        "guidance": plan.guidance,
        "guidance_scale": plan.guidance_scale,
        "deviations": plan.deviations,
    }
    values: dict[str, Any] = json.loads(json.dumps(record))
    return values


def open_folder(out: Path, record: dict[str, Any]) -> None:
    """Make a folder for samples, or continue one that was begun with the same record.

    Raises:
        UserError: Its samples depend on other settings, each named, or were not made by this command.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE_NAME
    if not path.exists():
        if (out / "samples.npz").exists():
            raise UserError(f"{out}/samples.npz was not made by this command; give another --out")
        write_json(path, record)
        return
    if not path.is_file():
        raise UserError(f"{path} is not a file; give another --out")
    found = _LATER | read_document(path.read_bytes(), dict[str, Any], name=path, remedy="give another --out")
    differences = [
        f"{name:.60} was {reprlib.repr(found.get(name))} and is {reprlib.repr(record.get(name))}"
        for name in sorted(found.keys() | record.keys())
        if found.get(name) != record.get(name)
    ]
    if len(differences) > _MOST_NAMED:
        differences[_MOST_NAMED:] = [f"and {len(differences) - _MOST_NAMED} more"]
    if differences:
        raise UserError(
            f"{out} holds samples of other settings ({'; '.join(differences)}); give another --out or remove it"
        )
