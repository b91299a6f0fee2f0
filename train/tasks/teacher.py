"""The network a student is distilled from: a frozen velocity field, of ours or published, with guidance or without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shards import EncoderIdentity, IdentityMismatchError, UsageError
from train.flow.guidance import Model, auto_guidance, classifier_free, internal, unguided
from train.flow.integrators import Velocity
from train.flow.path import as_velocities
from train.models.build import Generator
from train.models.config import GeneratorConfig, has_base_output
from train.settings.config import DiTSettings
from train.tasks.parts import DiTParts
from train.weights.published import load_dit
from train.weights.snapshot import is_snapshot, load_snapshot
from train.weights.tensor_files import file_digest


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen velocity field; it is in no checkpoint and has no averages."""

    field: Callable[[Tensor], Velocity]
    """field(labels int64 [B]) -> velocity(x [B, D, h, w], t [B]), in float32 and without gradient."""
    facts: dict[str, str]
    """Digests of the files it was read from, by the setting that names each."""


def load_teacher(parts: DiTParts) -> Teacher:
    """Return the teacher that the settings name, on the process's device.

    Raises:
        UserError: a file is missing or broken, or its network does not belong to the store and settings of the run.
    """
    settings, device = parts.settings, parts.normalizer.variance.device
    assert settings.teacher is not None
    facts = {"teacher": file_digest(settings.teacher)}
    model = _frozen(settings.teacher, parts, "the teacher")
    guidance = settings.teacher_guidance
    guide = None
    if guidance.guide is not None:
        facts["teacher_guidance.guide"] = file_digest(guidance.guide)
        guide = _frozen(guidance.guide, parts, "the teacher's guide")
    null_label = model.config.num_classes
    if guidance.kind == "internal" and not has_base_output(model.config):
        raise UsageError(
            "internal guidance needs a teacher with a base output, as presets raev2-* train; "
            f"{settings.teacher} has none"
        )

    flow = settings.flow

    def velocities(network: Generator, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        with torch.no_grad(), _arithmetic(settings, device):
            return as_velocities(network(x, t, y), x, t, flow.prediction, flow.time_floor)

    def both(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        full, base = velocities(model, x, t, y)
        return full, base

    def own(network: Generator) -> Model:
        return lambda x, t, y: velocities(network, x, t, y)[0]

    def field(y: Tensor) -> Velocity:
        scale, interval = guidance.scale, guidance.interval
        if guidance.kind == "cfg":
            return classifier_free(own(model), y, scale, null_label=null_label, interval=interval)
        if guidance.kind == "autoguidance":
            assert guide is not None
            return auto_guidance(own(model), own(guide), y, scale, interval=interval)
        if guidance.kind == "internal":
            return unguided(internal(both, scale, null_label=null_label, interval=interval), y)
        return unguided(own(model), y)

    return Teacher(field=field, facts=facts)


def _arithmetic(settings: DiTSettings, device: torch.device) -> AbstractContextManager[object]:
    """Return the run's own arithmetic, except where the weights are bfloat16."""
    if settings.teacher_dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _frozen(path: Path, parts: DiTParts, name: str) -> Generator:
    """Return a network that is only called, checked against the run."""
    settings, device = parts.settings, parts.normalizer.variance.device
    model = _published(path, parts, name) if not is_snapshot(path) else _snapshot(path, parts, name)
    model = model.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature
    if settings.teacher_dtype == "bfloat16":
        # Only matrices of blocks: they are nearly all of it, and autocast multiplies them in bfloat16 anyway.
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    model.to(device)
    if settings.compile:
        model.compile()
    return model


def _published(path: Path, parts: DiTParts, name: str) -> Generator:
    model = load_dit(path)
    _require_same_shape(path, model.config, parts, name)
    if parts.settings.statistics is None:
        raise UsageError(
            f"a published file does not say by which statistics its latents were normalised, and {name} {path} must "
            "share the run's; give --statistics stat.pt"
        )
    return model


def _snapshot(path: Path, parts: DiTParts, name: str) -> Generator:
    snapshot = load_snapshot(path)
    meta = snapshot.meta
    if snapshot.kind != "dit" or snapshot.normalizer is None:
        raise UsageError(f"{name} must be a snapshot of train/dit.py; {path} is a {snapshot.kind}'s")
    model: Generator = snapshot.model  # type: ignore[assignment]
    _require_same_shape(path, model.config, parts, name)
    if parts.store is not None:
        encoder = EncoderIdentity.from_dict(meta.encoder)
        encoder.require_same(parts.store.recipe.encoder, what=f"the store, and {name} {path}")
        names = tuple(parts.store.class_names)
        if meta.class_names and names and meta.class_names != names:
            raise IdentityMismatchError(f"{name} {path} was trained on other classes than the store's")
    if not snapshot.normalizer.same_as(parts.normalizer):
        raise IdentityMismatchError(
            f"{name} must see latents normalised as the run's; the statistics in {path} differ from those in "
            "RUN/normalizer.safetensors; start from its weights with --init-from, or give the same --statistics"
        )
    if meta.shift_base != parts.settings.flow.shift_base:
        raise UsageError(
            f"{name} {path} was trained with --flow.shift-base {meta.shift_base} and this run has "
            f"{parts.settings.flow.shift_base}; give the same"
        )
    flow = parts.settings.flow
    if (meta.prediction, meta.time_floor) != (flow.prediction, flow.time_floor):
        raise UsageError(
            f"a student puts out what its teacher does; prediction and time floor are {flow.prediction} and "
            f"{flow.time_floor} here and {meta.prediction} and {meta.time_floor} of {name} {path}: "
            "give --flow.prediction and --flow.time-floor"
        )
    return model


def _require_same_shape(path: Path, config: GeneratorConfig, parts: DiTParts, name: str) -> None:
    ours = parts.model.config
    for what in ("token_width", "grid", "num_classes"):
        if getattr(config, what) != getattr(ours, what):
            raise IdentityMismatchError(
                f"{name} {path} has {what} {getattr(config, what)} and this run {getattr(ours, what)}; "
                "a student sees the latents and classes of its teacher"
            )
