"""Small-sample FID while a DiT trains: set up once, asked many times, all processes sharing the work.

The same sampler, decoder and features as `eval/generation.py`, without files: images go straight to the
feature network. Always the same noise and labels, so that two measurements differ by the model alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eval.command import warn
from eval.generate.producer import Producer
from eval.generate.sampler import LatentSampler
from eval.metrics.cautions import sample_cautions
from eval.metrics.extraction import FeatureSet, gathered
from eval.metrics.features import FeatureName, FeatureNetwork
from eval.metrics.reference import load_reference
from eval.metrics.set_distances import frechet_distance
from eval.networks.load import Decoder
from train.distributed import Team
from train.models.normalizer import LatentNormalizer

_POOL: set[FeatureName] = {"pool"}
_SHARDED_BATCH = 32
"""Samples a process generates together where weights are sharded: all processes must call the network equally often."""
_GENERATED_AT_ONCE = 1024
_JUDGED_AT_ONCE = 64


class SmallSampleFid:
    """FID of a few samples; comparable between steps of a run, and runs with the same settings.

    Args:
        decoder: Decodes the samples; it must belong to the DiT's encoder.
        reference: Image folder, store, .npz of images, or published statistics.
        network: Computes the features.
        team: Processes of the training; all of them must call.
        num: Samples.

    Raises:
        UserError: The reference cannot be used.
    """

    def __init__(
        self, decoder: Decoder, reference: Path, network: FeatureNetwork, team: Team, *, num: int
    ) -> None:
        side = load_reference(reference, decoder.image_size, network, team, features=_POOL, manifold=False)
        self._reference = side.gaussians["pool"]
        self._decoder, self._network, self._team, self._num = decoder, network, team, num
        if team.is_main_process:
            for caution in sample_cautions(num, "--fid-every: FID"):
                warn(caution)

    def __call__(self, sampler: LatentSampler, normalizer: LatentNormalizer) -> float:
        """FID of the first samples of a sampler, on every process.

        Args:
            sampler: Samples latents with the weights to judge.
            normalizer: Between its latents and raw tokens.
        """
        producer = Producer(
            sampler=sampler,
            normalizer=normalizer,
            decoder=self._decoder,
            device=self._team.device,
            batch_size=_SHARDED_BATCH if self._team.sharded else None,
        )
        found = FeatureSet()
        generated: list[NDArray[np.uint8]] = []

        def keep(numbers: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
            generated.append(images[numbers < self._num])

        # Every process generates equally many; those beyond the last sample are not counted.
        share = -(-self._num // self._team.world_size)
        first = share * self._team.rank
        for start in range(first, first + share, _GENERATED_AT_ONCE):
            numbers = np.arange(start, min(start + _GENERATED_AT_ONCE, first + share), dtype=np.int64)
            # In turns, not side by side: features are computed in whole float32, a switch of the process, and samples
            # in the run's own arithmetic.
            producer.produce(numbers, keep)
            for images in generated:
                self._judge(images, found)
            generated.clear()
        return frechet_distance(self._reference, gathered(found, self._team).gaussian("pool"))

    def _judge(self, images: NDArray[np.uint8], found: FeatureSet) -> None:
        for part in torch.split(torch.from_numpy(images), _JUDGED_AT_ONCE):
            if len(part):
                features = self._network.features(part.to(self._team.device).permute(0, 3, 1, 2))
                found.add(features, moments=_POOL, keep=set())
