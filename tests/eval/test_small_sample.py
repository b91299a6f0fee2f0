"""Small-sample FID judges a model like the generation command does, without files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.feature_moments import FeatureMoments
from eval.features import InceptionFeatures
from eval.generation_plan import plan_of
from eval.generation_run import generate
from eval.metrics import frechet_distance
from eval.samples_file import map_samples
from eval.settings import GenerationSettings
from eval.small_sample import SmallSampleFid
from shards.errors import IdentityMismatchError
from train.distributed import Team
from train.snapshot import load_snapshot


@pytest.mark.slow
def test_it_is_the_distance_of_the_samples_the_command_makes(dit, decoder, encoder, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    small = SmallSampleFid(
        decoder,
        tmp_path / "real.npz",
        encoder,
        Team(),
        num=6,
        points=4,
        batch_size=4,
        feature_weights="random:0",
    )
    snapshot = load_snapshot(dit)
    found = small(snapshot.model, snapshot.normalizer, 3)

    settings = GenerationSettings(snapshot=dit, decoder=decoder, num=6, points=4, out=tmp_path / "out")
    generate(plan_of(settings))
    network = InceptionFeatures("random:0", torch.device("cpu"))
    gaussians = []
    for path in (tmp_path / "real.npz", tmp_path / "out" / "samples.npz"):
        images = torch.from_numpy(np.array(map_samples(path))).permute(0, 3, 1, 2)
        gaussians.append(FeatureMoments.of(network.features(images)["pool"].numpy()).gaussian())
    assert found == pytest.approx(frechet_distance(*gaussians), rel=2e-2)
    assert small(snapshot.model, snapshot.normalizer, 3) == pytest.approx(found, rel=1e-6)


def test_a_decoder_of_another_encoder_is_refused(decoder, encoder, tmp_path):
    with pytest.raises(IdentityMismatchError, match="another encoder"):
        SmallSampleFid(decoder, tmp_path, replace(encoder, weights_digest="another"), Team())
