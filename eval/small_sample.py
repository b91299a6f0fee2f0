"""Small-sample FID while a DiT trains: set up once, asked many times, all processes sharing the work.

The same sampler, decoder and features as `eval/generation.py`, without files: images go straight to the
feature network. Always the same noise and labels, so that two measurements differ by the model alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eval.feature_pass import FeatureSet, gathered, share
from eval.features import FeatureName, InceptionFeatures
from eval.metrics import frechet_distance
from eval.networks import decoder_of, load_decoder
from eval.reference import load_reference
from eval.sample_loop import Producer
from eval.sampler import LatentSampler
from eval.settings import Precision
from shards.identity import EncoderIdentity
from train.distributed import Team
from train.models.normalizer import LatentNormalizer

_POOL: set[FeatureName] = {"pool"}


class SmallSampleFid:
    """FID of a few unguided samples; comparable between steps of a run and nothing else.

    Args:
        decoder: Snapshot of the decoder.
        reference: Image folder, store, .npz of images, or published statistics.
        encoder: Encoder the DiT is trained for; the decoder must be for the same.
        team: Processes of the training; all of them must call.
        num: Samples.
        seed: Seed of noise.
        points: Points of the published time grid.
        shift_base: Numbers in a latent for which times are not shifted; as in training.
        precision: Arithmetic of the networks.
        batch_size: Samples computed together a process; None: as many as fit.
        feature_weights: See `eval.features.InceptionFeatures`.

    Raises:
        UserError: Decoder, reference or weights cannot be used.
    """

    def __init__(
        self,
        decoder: Path,
        reference: Path,
        encoder: EncoderIdentity,
        team: Team,
        *,
        num: int = 5000,
        seed: int = 0,
        points: int = 50,
        shift_base: int = 4096,
        precision: Precision = "fp32",
        batch_size: int | None = None,
        feature_weights: str = "public",
    ) -> None:
        snapshot = load_decoder(decoder, team.device, encoder)
        encoder.require_same(EncoderIdentity.from_dict(snapshot.meta.encoder), what=f"the decoder {decoder}")
        self._decoder = decoder_of(snapshot, precision)
        self._network = InceptionFeatures(feature_weights, team.device)
        side = load_reference(
            reference, self._decoder.image_size, self._network, team, features=_POOL, manifold=False
        )
        self._reference = side.gaussians["pool"]
        self._team, self._num, self._seed = team, num, seed
        self._points, self._shift_base = points, shift_base
        self._precision, self._batch_size = precision, batch_size

    def __call__(self, model: nn.Module, normalizer: LatentNormalizer, num_classes: int) -> float:
        """FID of the model's samples, on every process.

        Args:
            model: The DiT, in evaluation mode, with the weights to judge.
            normalizer: Between its latents and raw tokens.
            num_classes: Its classes, shown equally often.
        """
        channels, *grid = normalizer.variance.shape
        producer = Producer(
            sampler=LatentSampler(
                model=model,
                latent_shape=(channels, grid[0], grid[1]),
                num_classes=num_classes,
                classes=tuple(range(num_classes)),
                seed=self._seed,
                points=self._points,
                shift_base=self._shift_base,
                precision=self._precision,
            ),
            normalizer=normalizer,
            decoder=self._decoder,
            device=self._team.device,
            batch_size=self._batch_size,
        )
        start, stop = share(self._num, self._team)
        found = FeatureSet()

        def judge(_numbers: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
            pixels = torch.from_numpy(images).to(self._team.device).permute(0, 3, 1, 2)
            found.add(self._network.features(pixels), moments=_POOL, keep=set())

        producer.produce(np.arange(start, stop, dtype=np.int64), judge)
        return frechet_distance(self._reference, gathered(found, self._team).gaussian("pool"))
