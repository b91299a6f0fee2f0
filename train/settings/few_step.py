"""Settings of the objectives that make a network jump from noise to data in few evaluations. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shards import UsageError

if TYPE_CHECKING:
    from train.settings.config import DiTSettings


@dataclass(frozen=True, kw_only=True)
class TeacherGuidance:
    """Guidance of the teacher, whose velocity is then what its student learns without any; ours, not published."""

    kind: Literal["none", "cfg", "autoguidance", "internal"] = "none"
    """none, as published; cfg: classifier-free; autoguidance: by a weaker network, --teacher-guidance.guide; internal:
    by its own base output."""
    scale: float = 1.0
    """Weight of the guided direction, above 1."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts, both ends included; 0 is data, 1 is noise."""
    guide: Path | None = None
    """Snapshot of the weaker network for autoguidance, or a published file."""

    @property
    def guides_in_one_call(self) -> bool:
        """Whether guided velocity costs no more than the network's own."""
        return self.kind in ("none", "internal")

    def __post_init__(self) -> None:
        """Refuse guidance without what it needs, and what none of it needs."""
        if self.kind == "none" and (self.scale != 1.0 or self.guide is not None):
            raise UsageError(
                "--teacher-guidance.scale and .guide need a guidance; give --teacher-guidance.kind cfg, "
                "autoguidance or internal"
            )
        if self.kind != "none" and self.scale <= 1.0:
            raise UsageError(
                f"--teacher-guidance.kind {self.kind} needs its weight, --teacher-guidance.scale above 1; "
                f"got {self.scale}"
            )
        if (self.kind == "autoguidance") != (self.guide is not None):
            raise UsageError(
                "--teacher-guidance.guide SNAPSHOT and --teacher-guidance.kind autoguidance need each other; got "
                f"{self.guide} and {self.kind}"
            )
        low, high = self.interval
        if not 0.0 <= low < high <= 1.0:
            raise UsageError(
                f"--teacher-guidance.interval must be two times 0 ≤ low < high ≤ 1; got {low} {high}"
            )


@dataclass(frozen=True, kw_only=True)
class MeanFlowSettings:
    """Mean flows: distillation with a teacher, fine-tuning without.

    Source: github:sony/mf-rae src/train_mfd.py and src/stage2/transport/transport.py at fffc544.
    """

    share: float = 0.25
    """Share of the samples that learn a jump from t to an earlier r; the others have r = t."""
    jumps: Literal["spread", "random"] = "spread"
    """spread: evenly over the stream of samples, so that every micro-batch has one size; random: each drawn by itself,
    as published."""
    delta: float = 5e-3
    """Half the distance in time of the difference quotient."""
    derivative: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the difference quotient, whatever that of the network: fp32, or tf32 products as published."""
    power: float = 1.0
    """Power p of the loss L²/(L² + constant)^p, L the sum of squared errors; 1: the gradient of 2 ln L."""
    constant: float = 1e-3
    """Keeps the loss's weight finite."""

    def __post_init__(self) -> None:
        """Refuse what gives no derivative."""
        if self.derivative == "bf16":
            raise UsageError(
                "--mean-flow.derivative must be fp32 or tf32; in bf16 the difference of two nearly equal numbers has "
                "an error of a quarter to a half"
            )
        if not 0.0 < self.share <= 1.0:
            raise UsageError(f"--mean-flow.share must be above 0 and at most 1; got {self.share}")
        if not 0.0 < self.delta <= 0.1:
            raise UsageError(f"--mean-flow.delta must be above 0 and at most 0.1; got {self.delta}")
        if self.power < 0 or self.constant <= 0:
            raise UsageError(
                f"--mean-flow.power must be 0 or more and .constant above 0; got {self.power} and {self.constant}"
            )


@dataclass(frozen=True, kw_only=True)
class MidTrainingSettings:
    """Consistency mid-training on trajectories of the teacher; a sample of the stream is a trajectory.

    Source: github:sony/mf-rae src/train_cmt.py and src/stage2/transport/transport.py at fffc544.
    """

    points: int = 16
    """Points of a trajectory; one more than the teacher takes steps."""
    method: Literal["euler", "heun"] = "euler"
    """How the teacher steps; heun costs twice as many evaluations and contracts less."""
    grid: Literal["published", "to-zero"] = "published"
    """Grid of its times, shifted; published ends at 0.001 before the shift, to-zero on the data."""
    pairs: int = 64
    """Pairs of states drawn of each trajectory, with replacement."""
    labels: Literal["true", "published"] = "true"
    """Times the states are said to be at: where they are, or evenly spread over [0, 1] as published."""

    def __post_init__(self) -> None:
        """Refuse trajectories without a pair."""
        if self.points < 2:
            raise UsageError(
                f"--mid-training.points must be at least 2, a start and an end; got {self.points}"
            )
        if self.pairs < 1:
            raise UsageError(f"--mid-training.pairs must be at least 1; got {self.pairs}")


def forward_passes(settings: DiTSettings) -> float:
    """Forward passes that a sample of a step costs, a backward pass counting as two.

    A teacher's count as the network's own, and so do those of its guide.
    """
    with_gradient = 4 if settings.activation_checkpointing else 3
    taught = (0 if settings.teacher is None else 1) * (
        1 if settings.teacher_guidance.guides_in_one_call else 2
    )
    if settings.objective == "mid-training":
        trajectory = (settings.mid_training.points - 1) * (2 if settings.mid_training.method == "heun" else 1)
        return taught * trajectory + with_gradient * settings.mid_training.pairs
    if settings.objective == "mean-flow":
        return taught + 2 * settings.mean_flow.share + with_gradient
    return with_gradient


def require_start(settings: DiTSettings) -> None:
    """Refuse an objective without what it starts from.

    Raises:
        UsageError: a teacher or initial weights are missing, or a teacher is given to an objective without one.
    """
    if not settings.learns_jumps and settings.teacher is not None:
        raise UsageError(
            f"--teacher is for --objective mid-training and mean-flow; --objective {settings.objective} learns from "
            "the data alone, and --init-from SNAPSHOT gives it initial weights"
        )
    if settings.objective == "mid-training" and settings.teacher is None:
        raise UsageError(
            "--objective mid-training learns from a teacher's trajectories; give --teacher SNAPSHOT"
        )
    if settings.objective == "mean-flow" and settings.teacher is None and settings.init_from is None:
        raise UsageError(
            "--objective mean-flow without a teacher fine-tunes a network that can jump already; give --init-from "
            "SNAPSHOT of an earlier stage, or distil with --teacher SNAPSHOT"
        )
    if settings.learns_jumps and settings.repa.field is not None:
        raise UsageError(
            f"--repa.field does not align a network that learns jumps; leave it out of {settings.objective}"
        )
    if settings.teacher is None and settings.teacher_guidance != TeacherGuidance():
        raise UsageError("--teacher-guidance needs a teacher to guide; give --teacher SNAPSHOT")
