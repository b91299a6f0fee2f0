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

from eval.images.npz import open_npz, read_array
from eval.metrics.features import FeatureName
from eval.metrics.moments import Gaussian
from eval.settings import NetworkName
from shards import UsageError, replacing

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
    with open_npz(path) as archive:
        return any(name.startswith("mu") for name in archive.namelist())


def read_statistics(
    path: Path, features: set[FeatureName], section: NetworkName = "inception"
) -> SavedStatistics:
    """Return the statistics of the named features of a network.

    Raises:
        UsageError: There are none of a feature.
        UserError: The file is damaged.
    """
    gaussians = {}
    with open_npz(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        for name in features:
            keys = arrays_of(section, name)
            if keys is None or not set(keys) <= held:
                raise UsageError(
                    f"{path} holds {', '.join(sorted(held)[:12])}, no {name} statistics of {section}; leave out "
                    "their metric or give images as --reference"
                )
            gaussians[name] = _gaussian(archive, *keys)
        network = _suffixed("network", section)
        if network not in held:
            return SavedStatistics(gaussians=gaussians, has_images="arr_0" in held)
        return SavedStatistics(
            gaussians=gaussians,
            has_images="arr_0" in held,
            manifold=_features(archive, _suffixed("manifold", section)),
            network=str(_single(archive, network, "U")),
            kind=str(_single(archive, "kind", "U")),
            count=int(_single(archive, "count", "iu")),
        )


def _gaussian(archive: zipfile.ZipFile, mean_name: str, covariance_name: str) -> Gaussian:
    mean, covariance = _numbers(archive, mean_name), _numbers(archive, covariance_name)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{mean_name} has shape {list(mean.shape)} and {covariance_name} {list(covariance.shape)}; they must be "
            "[n] and [n, n]"
        )
    if (covariance.diagonal() < 0).any():
        raise ValueError(f"{covariance_name} has a negative variance")
    return Gaussian(mean=mean.astype(np.float64), covariance=covariance.astype(np.float64), count=None)


def _features(archive: zipfile.ZipFile, name: str) -> NDArray[np.float32]:
    features = _numbers(archive, name)
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {list(features.shape)}; it must be [n, width]")
    return features.astype(np.float32, copy=False)


def _numbers(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    values = read_array(archive, name)
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"{name} holds what is no finite number")
    return values


def _single(archive: zipfile.ZipFile, name: str, kinds: str) -> Any:
    """Read a single value of one of some kinds of types, as `numpy.dtype.kind` names them."""
    values = read_array(archive, name)
    if values.shape != () or values.dtype.kind not in kinds:
        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, and must be a single value")
    return values.item()


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
