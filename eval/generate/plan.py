"""From the settings of a generation, with their gaps, to a plan in which every choice is made. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from eval.protocols import PROTOCOLS, SAMPLERS, Protocol
from eval.settings import (
    ADM_METRICS,
    GenerationSettings,
    GridKind,
    Guidance,
    LabelRule,
    Prediction,
    SetMetric,
    require_decoder,
    require_reference,
    weights_by_name,
)
from shards import UsageError


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What a generation does, with every choice made."""

    settings: GenerationSettings
    """What was asked for, of which the fields below are the rest."""
    num: int
    labels: LabelRule
    kind: GridKind
    points: int
    method: str
    guidance: Guidance
    guidance_scale: float
    guidance_interval: tuple[float, float]
    metrics: tuple[SetMetric, ...]
    reference: Path | None
    deviations: tuple[str, ...]
    """Where this differs from the protocol it is called by."""


def plan_of(settings: GenerationSettings) -> GenerationPlan:
    """Fill in what the settings leave to the protocol or to the defaults.

    Raises:
        UsageError: A file is not there, guidance lacks its guide or its scale, or the protocol its reference.
    """
    for path in (settings.snapshot, settings.guide):
        if path is not None and not path.is_file():
            raise UsageError(
                f"a snapshot is a file like RUN/snapshots/latest.safetensors, found none at {path}"
            )
    require_decoder(settings.decoder)
    weights_by_name(settings.representation_weights)
    _require_origin(settings)
    require_reference(settings.reference)
    protocol = None if settings.protocol is None else PROTOCOLS[settings.protocol]
    sampler = SAMPLERS[settings.sampler or (protocol.sampler if protocol else "euler-50")]
    plan = GenerationPlan(
        settings=settings,
        num=settings.num_samples or (protocol.num if protocol else 64),
        labels=settings.labels or (protocol.labels if protocol else "equal"),
        kind=settings.time_grid or sampler.kind,
        points=settings.points or sampler.points,
        method=settings.method or sampler.method,
        guidance=settings.guidance or (protocol.guidance if protocol else "none"),
        guidance_scale=_scale(settings, protocol),
        guidance_interval=settings.guidance_interval
        or (protocol.guidance_interval if protocol else (0.0, 1.0)),
        metrics=settings.metrics or (protocol.metrics if protocol else ADM_METRICS),
        reference=settings.reference or (_published_reference(protocol) if protocol else None),
        deviations=_deviations(settings, protocol) if protocol else (),
    )
    if plan.guidance == "autoguidance" and settings.guide is None:
        raise UsageError("autoguidance needs the snapshot of a weaker model; give --guide SNAPSHOT")
    if plan.guidance != "autoguidance" and settings.guide is not None:
        raise UsageError(f"--guide is for --guidance autoguidance, the guidance here is {plan.guidance}")
    if plan.guidance == "none" and plan.guidance_scale != 1.0:
        raise UsageError(
            f"--guidance-scale {plan.guidance_scale} needs a guidance; give --guidance cfg, autoguidance or internal"
        )
    if settings.internal_scale is not None and plan.guidance not in ("cfg", "autoguidance"):
        raise UsageError(
            "--internal-scale is for internal guidance beneath --guidance cfg or autoguidance; alone it is --guidance "
            "internal --guidance-scale"
        )
    if settings.unconditional_scale is not None and (
        plan.guidance != "cfg" or settings.internal_scale is None
    ):
        raise UsageError("--unconditional-scale needs --guidance cfg and --internal-scale")
    _require_unguided_jumps(plan)
    return plan


def _require_unguided_jumps(plan: GenerationPlan) -> None:
    if plan.method == "jump" and plan.guidance != "none":
        raise UsageError(
            f"a jump is sampled without guidance, got {plan.guidance}: few-step models learn none, and guiding would "
            "cost a second evaluation; leave out --guidance, or distil a guided teacher (train/dit.py "
            "--teacher-guidance)"
        )


def with_sampler_of(
    plan: GenerationPlan, prediction: Prediction, *, end_time: bool = False
) -> GenerationPlan:
    """Return the plan with the default sampler of a model.

    A model that takes the end of a jump jumps, unless guidance or a method is asked for; one that predicts the data is
    followed to the data.
    """
    settings = plan.settings
    if (settings.sampler, settings.points, settings.protocol) != (None,) * 3:
        return plan
    if end_time and settings.method is None and plan.guidance == "none":
        sampler = SAMPLERS["jump-1"]
    elif prediction == "x":
        sampler = SAMPLERS["euler-50-to-zero"]
    else:
        return plan
    return replace(
        plan,
        kind=settings.time_grid or sampler.kind,
        points=sampler.points,
        method=settings.method or sampler.method,
    )


def _require_origin(settings: GenerationSettings) -> None:
    if settings.encoder_of is not None and not settings.encoder_of.is_dir():
        raise UsageError(f"--encoder-of must be a finished store, found none at {settings.encoder_of}")
    if settings.statistics is None:
        return
    if not settings.statistics.exists():
        raise UsageError(f"--statistics must be a file like stat.pt, found none at {settings.statistics}")
    if settings.encoder_of is None:
        raise UsageError(
            f"--statistics {settings.statistics} is for a published DiT, which needs its encoder; "
            "give --encoder-of STORE too"
        )


def _scale(settings: GenerationSettings, protocol: Protocol | None) -> float:
    if settings.guidance_scale is not None:
        return settings.guidance_scale
    guidance = settings.guidance or (protocol.guidance if protocol else "none")
    if guidance == "none":
        return 1.0
    if protocol is None or protocol.guidance != guidance:
        raise UsageError(f"--guidance {guidance} needs its weight; give --guidance-scale, above 1")
    return protocol.guidance_scale


def _published_reference(protocol: Protocol) -> Path:
    path = Path("data") / protocol.reference_name
    if not path.exists():
        raise UsageError(
            f"the protocol compares with {protocol.reference_name}, found none in data/; fetch it from "
            f"{protocol.reference_url} or give --reference PATH"
        )
    return path


def _deviations(settings: GenerationSettings, protocol: Protocol) -> tuple[str, ...]:
    published: dict[str, object] = {
        "num_samples": protocol.num,
        "labels": protocol.labels,
        "sampler": protocol.sampler,
        "points": SAMPLERS[protocol.sampler].points,
        "method": SAMPLERS[protocol.sampler].method,
        "time_grid": SAMPLERS[protocol.sampler].kind,
        "guidance": protocol.guidance,
        "guidance_scale": protocol.guidance_scale,
        "guidance_interval": protocol.guidance_interval,
        "classes": (),
        "shift_base": 4096,
        "rounding": False,
    }
    differing = []
    for name, value in published.items():
        given = getattr(settings, name)
        if given is not None and given != value:
            differing.append(f"{name.replace('_', ' ')} {given} instead of {value}")
    if settings.reference is not None and settings.reference.name != protocol.reference_name:
        differing.append(f"reference {settings.reference.name} instead of {protocol.reference_name}")
    if settings.internal_scale is not None:
        differing.append(f"internal guidance of scale {settings.internal_scale} as well")
    if settings.precision not in protocol.precisions:
        differing.append(f"precision {settings.precision} instead of {' or '.join(protocol.precisions)}")
    return tuple(differing)
