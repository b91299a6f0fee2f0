"""What generated images are compared with: published statistics, or the images of a folder, a store or an .npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.feature_moments import Gaussian
from eval.feature_pass import extract
from eval.features import FeatureName, FeatureNetwork
from eval.image_sources import ImageSource, NpzImages, evenly_spread, open_images
from shards.errors import UsageError, UserError
from train.distributed import Team

MANIFOLD_COUNT = 10_000
"""Reference images of precision and recall: as many as a published reference batch holds.

Source: github:openai/guided-diffusion evaluations/README.md (reference batches of 10,000 images).
"""

_STATISTICS: dict[FeatureName, tuple[str, str]] = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Arrays of a published reference batch. Source: evaluator.py, Evaluator.read_statistics."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The side of a comparison that stays the same."""

    path: Path
    kind: str
    """folder, store, samples or statistics."""
    count: int | None
    """Images behind it; None where published statistics do not say."""
    gaussians: dict[FeatureName, Gaussian] = field(default_factory=dict)
    manifold: NDArray[np.float32] | None = None
    """`pool` features for precision and recall, float32 [n, 2048]."""


def load_reference(
    path: Path,
    image_size: tuple[int, int],
    network: FeatureNetwork,
    team: Team,
    *,
    features: set[FeatureName],
    manifold: bool,
) -> Reference:
    """Statistics of a reference, read or computed.

    Args:
        path: An image folder, a store, an .npz of samples, or published statistics.
        image_size: Height and width of the images to be compared with it.
        network: Computes what is not published.
        team: Processes that share the work; all must call.
        features: Features whose mean and covariance are needed.
        manifold: Whether features for precision and recall are needed.

    Raises:
        UsageError: The images have another size, or the statistics lack what is needed.
        UserError: A file is damaged or no image.
    """
    if _holds_statistics(path):
        return _published(path, image_size, network, team, features=features, manifold=manifold)
    source = open_images(path, image_size)
    found = extract(source, network, team, moments=features, keep=set(), label=f"features of {path.name}")
    return Reference(
        path=path,
        kind=source.kind,
        count=len(source),
        gaussians={name: found.gaussian(name) for name in features},
        manifold=_manifold(source, network, team) if manifold else None,
    )


def _holds_statistics(path: Path) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole .npz ({error}); download or write it again") from error


def _published(
    path: Path,
    image_size: tuple[int, int],
    network: FeatureNetwork,
    team: Team,
    *,
    features: set[FeatureName],
    manifold: bool,
) -> Reference:
    gaussians = {}
    try:
        with np.load(path) as archive:
            for name in features:
                keys = _STATISTICS.get(name)
                if keys is None or not set(keys) <= set(archive.files):
                    raise UsageError(
                        f"{path} holds {', '.join(archive.files)}, no statistics of {name} features; leave out "
                        "their metric or give images as --reference"
                    )
                mean, covariance = (archive[key].astype(np.float64) for key in keys)
                gaussians[name] = Gaussian(mean=mean, covariance=covariance, count=None)
            has_images = "arr_0" in archive.files
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npz ({error}); download or write it again") from error
    if manifold and not has_images:
        raise UsageError(
            f"precision and recall need reference images, {path} holds none; give --metrics without them"
        )
    images = open_images(path, image_size) if has_images else None
    return Reference(
        path=path,
        kind="statistics",
        count=None,
        gaussians=gaussians,
        manifold=_manifold(images, network, team) if manifold and images is not None else None,
    )


class _Some:
    """A few images of a source, evenly spread over it."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.kind, self.path, self.image_size = source.kind, source.path, source.image_size
        self._source = source
        self._numbers = evenly_spread(count, len(source))

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        images = [self._source.read(int(number), int(number) + 1) for number in self._numbers[start:stop]]
        return np.concatenate(images)


def _manifold(source: ImageSource, network: FeatureNetwork, team: Team) -> NDArray[np.float32]:
    chosen = source if isinstance(source, NpzImages) else _Some(source, MANIFOLD_COUNT)
    found = extract(chosen, network, team, moments=set(), keep={"pool"}, label="reference manifold")
    return found.features("pool")
