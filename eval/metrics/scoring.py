"""Features → moments → metrics for one set of images against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.images.sources import ImageSource, NpzImages
from eval.metrics.extraction import FeatureSet, extract
from eval.metrics.features import DinoFeatures, FeatureName, InceptionFeatures
from eval.metrics.reference import Reference, load_reference
from eval.metrics.set_distances import frechet_distance, inception_score, precision_recall
from eval.settings import SetMetric
from train.distributed import Team


@dataclass(kw_only=True)
class Comparison:
    """Metrics of a set of images, and what they were computed with."""

    metrics: dict[str, float] = field(default_factory=dict)
    """By name; on the leading process only."""
    reference_kind: str = ""
    reference_count: int | None = None
    networks: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the weights of each feature network, by its name."""
    cautions: list[str] = field(default_factory=list)


def compare(
    samples: Path,
    reference: Path,
    metrics: Sequence[SetMetric],
    team: Team,
    *,
    inception_weights: str,
    dinov2_weights: str,
) -> Comparison:
    """Compare the samples in an .npz with a reference; every process of the team must call.

    Args:
        samples: The .npz.
        reference: Image folder, store, .npz of images, or published statistics.
        metrics: Which metrics.
        team: Processes that share the work.
        inception_weights: See `eval.metrics.features.InceptionFeatures`.
        dinov2_weights: See `eval.metrics.features.DinoFeatures`.

    Raises:
        UserError: The two cannot be compared.
    """
    images = NpzImages(samples)
    found = Comparison()
    if any(metric != "fd_dinov2" for metric in metrics):
        network = InceptionFeatures(inception_weights, team.device)
        found.networks[network.name] = network.digest
        side = load_reference(
            reference,
            images.image_size,
            network,
            team,
            features=needed_moments(metrics),
            manifold="precision_recall" in metrics,
        )
        if side.kind == "statistics" and inception_weights != "public":
            found.cautions.append(
                f"{reference.name} holds statistics of the public Inception weights, compared here with features "
                f"of {inception_weights}"
            )
        features = extract(
            images,
            network,
            team,
            moments=needed_moments(metrics),
            keep=needed_features(metrics),
            label="features of the samples",
        )
        if team.is_main_process:
            found.metrics |= inception_metrics(features, side, metrics, team.device)
        found.reference_kind, found.reference_count = side.kind, side.count
    if "fd_dinov2" in metrics:
        _add_dinov2(found, images, reference, team, dinov2_weights)
    return found


def needed_moments(metrics: Sequence[SetMetric]) -> set[FeatureName]:
    """Inception features whose mean and covariance these metrics compare."""
    names: dict[SetMetric, FeatureName] = {"fid": "pool", "sfid": "spatial"}
    return {names[metric] for metric in metrics if metric in names}


def needed_features(metrics: Sequence[SetMetric]) -> set[FeatureName]:
    """Inception features these metrics need of every single image."""
    names: dict[SetMetric, FeatureName] = {"is": "logits", "precision_recall": "pool"}
    return {names[metric] for metric in metrics if metric in names}


def inception_metrics(
    features: FeatureSet, reference: Reference, metrics: Sequence[SetMetric], device: torch.device
) -> dict[str, float]:
    """The metrics on Inception features, by name; pure but for the device it computes distances on."""
    found: dict[str, float] = {}
    if "fid" in metrics:
        found["fid"] = frechet_distance(reference.gaussians["pool"], features.gaussian("pool"))
    if "sfid" in metrics:
        found["sfid"] = frechet_distance(reference.gaussians["spatial"], features.gaussian("spatial"))
    if "is" in metrics:
        found["is"] = inception_score(features.features("logits"))
    if "precision_recall" in metrics:
        assert reference.manifold is not None
        real, generated = (
            torch.from_numpy(side).to(device) for side in (reference.manifold, features.features("pool"))
        )
        found["precision"], found["recall"] = precision_recall(real, generated)
    return found


def _add_dinov2(found: Comparison, images: ImageSource, reference: Path, team: Team, weights: str) -> None:
    network = DinoFeatures(weights, team.device)
    found.networks[network.name] = network.digest
    names: set[FeatureName] = {"cls"}
    side = load_reference(reference, images.image_size, network, team, features=names, manifold=False)
    features = extract(images, network, team, moments=names, keep=set(), label="DINOv2 of the samples")
    if team.is_main_process:
        found.metrics["fd_dinov2"] = frechet_distance(side.gaussians["cls"], features.gaussian("cls"))
    if not found.reference_kind:
        found.reference_kind, found.reference_count = side.kind, side.count
