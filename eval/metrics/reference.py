"""What generated images are compared with: published statistics, or the images of a folder, a store or an .npz."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.images.sources import ImageSource, NpzImages, open_images
from eval.metrics.extraction import extract
from eval.metrics.features import FeatureName, FeatureNetwork
from eval.metrics.moments import Gaussian
from eval.metrics.reference_file import (
    ARRAYS,
    SavedStatistics,
    holds_statistics,
    read_statistics,
    write_statistics,
)
from eval.settings import NetworkName
from shards import UsageError, even_spread
from train.distributed import Team

MANIFOLD_COUNT = 10_000
"""Reference images whose features are kept one by one: as many as a published reference batch holds.

Source: github:openai/guided-diffusion evaluations/README.md (reference batches of 10,000 images).
"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The side of a comparison that stays the same."""

    path: Path
    kind: str
    """folder, files, store, samples or statistics."""
    count: int | None
    """Images behind it; None where published statistics do not say."""
    gaussians: dict[FeatureName, Gaussian] = field(default_factory=dict)
    manifold: NDArray[np.float32] | None = None
    """The network's main features of single images, float32 [n, width]."""


def load_reference(
    path: Path,
    image_size: tuple[int, int],
    network: FeatureNetwork,
    team: Team,
    *,
    features: set[FeatureName],
    manifold: bool,
    section: NetworkName = "inception",
) -> Reference:
    """Return the statistics of a reference, read or computed.

    Args:
        path: An image folder, a store, an .npz of samples, or published statistics.
        image_size: Height and width of the images to be compared with it.
        network: Computes what is not published.
        team: Processes that share the work; all must call.
        features: Features whose mean and covariance are needed.
        manifold: Whether main features of single images are needed.
        section: What saved statistics call the network.

    Raises:
        UsageError: The images have another size, or the statistics lack what is needed.
        UserError: A file is damaged or no image.
    """
    if holds_statistics(path):
        return _published(
            path, image_size, network, team, features=features, manifold=manifold, section=section
        )
    source = open_images(path, image_size)
    found = extract(source, network, team, moments=features, keep=set(), label=f"features of {path.name}")
    return Reference(
        path=path,
        kind=source.kind,
        count=len(source),
        gaussians={name: found.gaussian(name) for name in features},
        manifold=_manifold(source, network, team) if manifold else None,
    )


def save_reference(
    images: Path,
    image_size: tuple[int, int],
    networks: Mapping[NetworkName, Callable[[], FeatureNetwork]],
    team: Team,
    out: Path,
) -> None:
    """Compute the statistics of images that every metric on the networks' features needs, and write them.

    Args:
        images: An image folder, a store, or an .npz of samples.
        image_size: Height and width of the images.
        networks: Make what computes the features, by name; one is held at a time.
        team: Processes that share the work; all must call.
        out: The .npz to write.

    Raises:
        UsageError: The images have another size, or they are statistics already.
        UserError: A file is damaged or no image.
    """
    if holds_statistics(images):
        raise UsageError(f"{images} holds statistics already; give it as --reference")
    saved: dict[NetworkName, SavedStatistics] = {}
    for name, make_network in networks.items():
        network = make_network()
        features = set(ARRAYS) if name == "inception" else {network.main}
        found = load_reference(images, image_size, network, team, features=features, manifold=True)
        saved[name] = SavedStatistics(
            gaussians=found.gaussians,
            manifold=found.manifold,
            network=network.digest,
            kind=found.kind,
            count=found.count,
        )
    if team.is_main_process:
        write_statistics(out, saved)


def _published(
    path: Path,
    image_size: tuple[int, int],
    network: FeatureNetwork,
    team: Team,
    *,
    features: set[FeatureName],
    manifold: bool,
    section: NetworkName,
) -> Reference:
    saved = read_statistics(path, features, section)
    if saved.network not in (None, network.digest):
        raise UsageError(
            f"{path} holds statistics of other weights than those of {network.name} here; compute both with the "
            "same --feature-weights"
        )
    if manifold and not saved.has_images and saved.manifold is None:
        raise UsageError(
            f"metrics that compare single images need reference images, {path} holds none for {section}; give "
            "--metrics without them"
        )
    images = open_images(path, image_size) if saved.has_images else None
    real = saved.manifold
    if manifold and images is not None:
        real = _manifold(images, network, team)
    return Reference(
        path=path,
        kind=saved.kind or "statistics",
        count=saved.count,
        gaussians=saved.gaussians,
        manifold=real if manifold else None,
    )


class _Some:
    """A few images of a source, evenly spread over it."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.kind, self.path, self.image_size = source.kind, source.path, source.image_size
        self._source = source
        self._numbers = even_spread(count, len(source))

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self._source.read_some(self._numbers[start:stop])

    def read_some(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._source.read_some(self._numbers[numbers])


def _manifold(source: ImageSource, network: FeatureNetwork, team: Team) -> NDArray[np.float32]:
    chosen = source if isinstance(source, NpzImages) else _Some(source, MANIFOLD_COUNT)
    found = extract(chosen, network, team, moments=set(), keep={network.main}, label="reference manifold")
    return found.features(network.main)
