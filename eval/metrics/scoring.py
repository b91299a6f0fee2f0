"""Features → moments → metrics for one set of images against a reference, by a table of metrics.

To add a metric: a pure function in `eval.metrics.set_distances`, a row in `METRICS`, its name in
`eval.settings.SetMetric`. To add a feature network: a class like `eval.metrics.features.InceptionFeatures`, and a row
in `NETWORKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from eval.images.sources import NpzImages
from eval.metrics.extraction import FeatureSet, extract
from eval.metrics.features import (
    REPRESENTATIONS,
    DinoFeatures,
    FeatureName,
    FeatureNetwork,
    InceptionFeatures,
    TimmFeatures,
)
from eval.metrics.reference import Reference, load_reference
from eval.metrics.set_distances import (
    frechet_distance,
    frechet_ratio,
    inception_score,
    mind,
    precision_recall,
)
from eval.settings import NetworkName
from train.distributed import Team

NETWORKS: dict[NetworkName, Callable[[str, torch.device], FeatureNetwork]] = {
    "inception": InceptionFeatures,
    "dinov2": DinoFeatures,
    **{name: partial(TimmFeatures, row) for name, row in REPRESENTATIONS.items()},
}
"""Feature networks by name; each is made of its weights (`public`, a file or `random:SEED`) and a device."""


@dataclass(frozen=True)
class Sides:
    """What a metric compares: features of the samples with those of the reference.

    Attributes:
        reference: Mean and covariance of its features, and its manifold.
        samples: Moments of the samples' features, and those kept.
        device: Where distances may be computed.
    """

    reference: Reference
    samples: FeatureSet
    device: torch.device

    def frechet(self, feature: FeatureName) -> float:
        """Return Fréchet distance of a feature."""
        return frechet_distance(self.reference.gaussians[feature], self.samples.gaussian(feature))

    def precision_recall(self) -> tuple[float, float]:
        """Return precision and recall on `pool` features."""
        real, generated = self._single("pool")
        return precision_recall(real, generated)

    def mind(self, feature: FeatureName) -> float:
        """Return MIND on a network's main feature."""
        real, generated = self._single(feature)
        return mind(generated, real)

    def _single(self, feature: FeatureName) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of single reference images and of every sample; `feature` is the network's main one."""
        assert self.reference.manifold is not None, "the metric's row in METRICS needs manifold=True"
        real, generated = (
            torch.from_numpy(side).to(self.device)
            for side in (self.reference.manifold, self.samples.features(feature))
        )
        return real, generated


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric on sets of features.

    Attributes:
        network: Whose features.
        values: Figures by name of the two sides; called on the main process.
        moments: Features whose mean and covariance it compares.
        keep: Features it needs of every single sample.
        manifold: Whether it needs the network's main feature of single reference images: of all of an .npz, of up to
            `MANIFOLD_COUNT` of any other.
    """

    network: NetworkName
    values: Callable[[Sides], dict[str, float]]
    moments: frozenset[FeatureName] = frozenset()
    keep: frozenset[FeatureName] = frozenset()
    manifold: bool = False


METRICS: dict[str, Metric] = {
    "fid": Metric(
        network="inception",
        values=lambda sides: {"fid": sides.frechet("pool")},
        moments=frozenset({"pool"}),
    ),
    "sfid": Metric(
        network="inception",
        values=lambda sides: {"sfid": sides.frechet("spatial")},
        moments=frozenset({"spatial"}),
    ),
    "is": Metric(
        network="inception",
        values=lambda sides: {"is": inception_score(sides.samples.features("logits"))},
        keep=frozenset({"logits"}),
    ),
    "precision_recall": Metric(
        network="inception",
        values=lambda sides: dict(zip(("precision", "recall"), sides.precision_recall(), strict=True)),
        keep=frozenset({"pool"}),
        manifold=True,
    ),
    "fd_dinov2": Metric(
        network="dinov2",
        values=lambda sides: {"fd_dinov2": sides.frechet("cls")},
        moments=frozenset({"cls"}),
    ),
    "mind": Metric(
        network="inception",
        values=lambda sides: {"mind": sides.mind("pool")},
        keep=frozenset({"pool"}),
        manifold=True,
    ),
}

SPACES: dict[str, tuple[NetworkName, FeatureName]] = {
    "inception": ("inception", "pool"),
    "convnext": ("convnext", "embedding"),
    "dinov2": ("dinov2-256", "embedding"),
    "mae": ("mae", "embedding"),
    "siglip": ("siglip", "embedding"),
    "clip": ("clip", "embedding"),
}
"""The six representations of FDr6, as `VALIDATION_DISTANCES` calls them: network and feature."""


def _ratio(space: str, feature: FeatureName) -> Callable[[Sides], dict[str, float]]:
    return lambda sides: {f"fdr_{space}": frechet_ratio(sides.frechet(feature), space)}


def _mind(space: str, feature: FeatureName) -> Callable[[Sides], dict[str, float]]:
    return lambda sides: {f"mind_{space}": sides.mind(feature)}


for _space, (_network, _feature) in SPACES.items():
    METRICS[f"fdr_{_space}"] = Metric(
        network=_network, values=_ratio(_space, _feature), moments=frozenset({_feature})
    )
    METRICS[f"mind_{_space}"] = Metric(
        network=_network, values=_mind(_space, _feature), keep=frozenset({_feature}), manifold=True
    )

MEANS: dict[str, tuple[str, ...]] = {
    "fdr6": tuple(f"fdr_{space}" for space in SPACES),
    "mind6": tuple(f"mind_{space}" for space in SPACES),
}
"""Metrics that are the mean of others, which are reported too."""

MEAN_CAUTIONS = {
    "fdr6": "FDr6 divides by distances of ImageNet's validation images at 256 pixels: it means something only against "
    "statistics of all ImageNet training images; features are float32 here and bfloat16 in FD-loss",
    "mind6": "MIND of six representations is their mean here; how RAEv2's private evaluator combines them is not known",
}
"""What to know of them."""


@dataclass(kw_only=True)
class Comparison:
    """Metrics of a set of images, and what they were computed with."""

    metrics: dict[str, float] = field(default_factory=dict)
    """By name; on the main process only."""
    reference_kind: str = ""
    reference_count: int | None = None
    networks: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the weights of each feature network, by its name."""
    cautions: list[str] = field(default_factory=list)


def compare(
    samples: Path,
    reference: Path,
    metrics: Sequence[str],
    team: Team,
    *,
    weights: Mapping[NetworkName, str],
) -> Comparison:
    """Compare the samples in an .npz with a reference; every process of the team must call.

    Args:
        samples: The .npz.
        reference: Images as `pipeline encode` takes them, a store, an .npz of images, or published statistics.
        metrics: Which metrics.
        team: Processes that share the work.
        weights: Of feature networks: `public`, a file, or `random:SEED`; those not named are public.

    Raises:
        UserError: The two cannot be compared.
    """
    images = NpzImages(samples)
    found = Comparison()
    asked, metrics = metrics, _expanded(metrics)
    for name, make_network in NETWORKS.items():
        wanted = [METRICS[metric] for metric in metrics if METRICS[metric].network == name]
        if not wanted:
            continue
        network = make_network(weights.get(name, "public"), team.device)
        found.networks[network.name] = network.digest
        moments = {feature for metric in wanted for feature in metric.moments}
        side = load_reference(
            reference,
            images.image_size,
            network,
            team,
            features=moments,
            manifold=any(metric.manifold for metric in wanted),
            section=name,
        )
        if side.kind == "statistics" and weights.get(name, "public") != "public":
            found.cautions.append(
                f"{reference.name} holds statistics of the public {network.name} weights, compared here with "
                f"features of {weights[name]}"
            )
        features = extract(
            images,
            network,
            team,
            moments=moments,
            keep={feature for metric in wanted for feature in metric.keep},
            label=f"{network.name} of the samples",
        )
        if team.is_main_process:
            sides = Sides(side, features, team.device)
            for metric in wanted:
                found.metrics |= metric.values(sides)
        if not found.reference_kind:
            found.reference_kind, found.reference_count = side.kind, side.count
    for mean in asked:
        if mean in MEANS:
            found.cautions.append(MEAN_CAUTIONS[mean])
            if team.is_main_process:
                parts = [found.metrics[part] for part in MEANS[mean]]
                found.metrics[mean] = sum(parts) / len(parts)
    return found


def _expanded(metrics: Sequence[str]) -> list[str]:
    """Return metrics, with the parts of a mean in its place, each once."""
    parts = [part for metric in metrics for part in MEANS.get(metric, (metric,))]
    return list(dict.fromkeys(parts))
