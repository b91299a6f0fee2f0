"""Run images through a feature network once, shared by all processes: moments, and features kept for later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from eval.images.sources import ImageSource, blocks
from eval.metrics.features import FeatureName, FeatureNetwork
from eval.metrics.moments import FeatureMoments, Gaussian
from train.distributed import Team

BATCH_SIZE = 64
"""Images a feature network sees at once; its results change only by rounding."""


@dataclass
class FeatureSet:
    """What the metrics need to know about a set of images."""

    moments: dict[FeatureName, FeatureMoments] = field(default_factory=dict)
    kept: dict[FeatureName, list[NDArray[np.float32]]] = field(default_factory=dict)
    """Features themselves, in blocks, in the order of the images."""

    def add(
        self,
        features: Mapping[FeatureName, torch.Tensor],
        *,
        moments: set[FeatureName],
        keep: set[FeatureName],
    ) -> None:
        """Add the features of a batch: those in `moments` are accumulated, those in `keep` stored."""
        for name in moments | keep:
            block = features[name].cpu().numpy()
            if name in moments:
                self.moments.setdefault(name, FeatureMoments(block.shape[1])).update(block)
            if name in keep:
                self.kept.setdefault(name, []).append(block)

    def merge(self, other: FeatureSet) -> None:
        """Add what the next process saw."""
        for name, moments in other.moments.items():
            self.moments.setdefault(name, FeatureMoments(len(moments.mean))).merge(moments)
        for name, kept in other.kept.items():
            self.kept.setdefault(name, []).extend(kept)

    def gaussian(self, name: FeatureName) -> Gaussian:
        """Return the mean and covariance of a feature."""
        return self.moments[name].gaussian()

    def features(self, name: FeatureName) -> NDArray[np.float32]:
        """Kept features float32 [n, width], in the order of the images."""
        return np.concatenate(self.kept[name])


def share(total: int, team: Team) -> tuple[int, int]:
    """Return this process's consecutive part of `total` items: first and one past the last."""
    return total * team.rank // team.world_size, total * (team.rank + 1) // team.world_size


def extract(
    images: ImageSource,
    network: FeatureNetwork,
    team: Team,
    *,
    moments: set[FeatureName],
    keep: set[FeatureName],
    label: str,
) -> FeatureSet:
    """Return the features of all images of a source; every process reads its share and gets the whole result."""
    start, stop = share(len(images), team)
    batches = _read_ahead(images, blocks(start, stop, BATCH_SIZE))
    progress = tqdm(
        batches, total=-(-(stop - start) // BATCH_SIZE), desc=label, disable=not team.is_main_process
    )
    found = FeatureSet()
    for batch in progress:
        pixels = torch.from_numpy(batch).to(team.device).permute(0, 3, 1, 2)
        found.add(network.features(pixels), moments=moments, keep=keep)
    return gathered(found, team)


def gathered(found: FeatureSet, team: Team) -> FeatureSet:
    """Return the feature sets of all processes as one, in the order of their ranks, on every process."""
    parts: list[FeatureSet] = team.gather(found)
    whole = FeatureSet()
    for part in parts:
        whole.merge(part)
    return whole


def _read_ahead(images: ImageSource, ranges: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
    """Read the next block while the current one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = None
        for start, stop in ranges:
            following = reader.submit(images.read, start, stop)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
