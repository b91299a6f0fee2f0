"""Reference statistics in an .npz: the published layout, and ours, which adds what they were computed from.

| array | holds | published | ours |
|---|---|---|---|
| `mu`, `sigma` | mean and covariance of the `pool` features | yes | yes |
| `mu_s`, `sigma_s` | of the `spatial` features | yes | yes |
| `arr_0` | images, uint8 [n, H, W, 3], for precision and recall | yes | no |
| `manifold` | their `pool` features instead, float32 [n, 2048] | no | yes |
| `network` | digest of the network's weights | no | yes |
| `kind`, `count` | what the images were, and how many | no | yes |

These are Inception's. Of another network NAME the arrays are `mu_NAME`, `sigma_NAME`, `manifold_NAME`, `network_NAME`.

Source: github:openai/guided-diffusion evaluations/evaluator.py, Evaluator.read_statistics.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics.features import FeatureName
from eval.metrics.moments import Gaussian
from eval.settings import NetworkName
from shards import UsageError, UserError, replacing

ARRAYS: dict[FeatureName, tuple[str, str]] = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of the mean and covariance of Inception's features."""


def arrays_of(section: NetworkName, feature: FeatureName) -> tuple[str, str] | None:
    """Return the names of the mean and covariance of a network's feature; None where they are not saved."""
    if section == "inception":
        return ARRAYS.get(feature)
    return f"mu_{section}", f"sigma_{section}"


def _suffixed(name: str, section: NetworkName) -> str:
    return name if section == "inception" else f"{name}_{section}"


@dataclass(frozen=True, kw_only=True)
class SavedStatistics:
    """What such a file holds."""

    gaussians: dict[FeatureName, Gaussian]
    has_images: bool = False
    """Whether there are images for precision and recall."""
    manifold: NDArray[np.float32] | None = None
    """Their features, float32 [n, 2048]."""
    network: str | None = None
    """SHA-256 of the feature network's weights; None, here and below: a published file does not say."""
    kind: str | None = None
    """What the images were: folder, store or samples."""
    count: int | None = None
    """How many."""


def holds_statistics(path: Path) -> bool:
    """Return whether a path is an .npz of statistics, not of samples.

    Raises:
        UserError: It is a broken .npz.
    """
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.startswith("mu") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole .npz ({error}); download or write it again") from error


def read_statistics(
    path: Path, features: set[FeatureName], section: NetworkName = "inception"
) -> SavedStatistics:
    """Return the statistics of the named features of a network.

    Raises:
        UsageError: There are none of a feature.
        UserError: The file is damaged.
    """
    gaussians = {}
    try:
        with np.load(path) as archive:
            for name in features:
                keys = arrays_of(section, name)
                if keys is None or not set(keys) <= set(archive.files):
                    raise UsageError(
                        f"{path} holds {', '.join(archive.files)}, no {name} statistics of {section}; leave out "
                        "their metric or give images as --reference"
                    )
                mean, covariance = (archive[key].astype(np.float64) for key in keys)
                gaussians[name] = Gaussian(mean=mean, covariance=covariance, count=None)
            network = _suffixed("network", section)
            ours = network in archive.files
            return SavedStatistics(
                gaussians=gaussians,
                has_images="arr_0" in archive.files,
                manifold=archive[_suffixed("manifold", section)] if ours else None,
                network=str(archive[network]) if ours else None,
                kind=str(archive["kind"]) if ours else None,
                count=int(archive["count"]) if ours else None,
            )
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} is not a whole .npz ({error}); download or write it again") from error


def write_statistics(path: Path, saved: Mapping[NetworkName, SavedStatistics]) -> None:
    """Write such a file, whole or not at all; by network, each with everything but images."""
    arrays: dict[str, Any] = {}
    for section, found in saved.items():
        assert found.manifold is not None
        arrays |= {
            _suffixed("manifold", section): found.manifold,
            _suffixed("network", section): found.network,
        }
        for name, gaussian in found.gaussians.items():
            names = arrays_of(section, name)
            assert names is not None
            arrays |= {names[0]: gaussian.mean, names[1]: gaussian.covariance}
        arrays |= {"kind": found.kind, "count": found.count}
    with replacing(path) as file:
        np.savez(file, **arrays)
