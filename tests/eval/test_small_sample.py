"""FID of a few samples while a DiT trains: the same numbers as generating the samples and comparing them."""

import numpy as np
import pytest
import torch

from eval.generate.plan import plan_of
from eval.generate.run import generate
from eval.generate.sampler import LatentSampler
from eval.generate.small_sample import SmallSampleFid
from eval.images.samples import map_samples
from eval.metrics.moments import FeatureMoments
from eval.metrics.set_distances import frechet_distance
from eval.networks.load import decoder_of, load_decoder
from eval.settings import GenerationSettings
from train.distributed import Team
from train.engine.arithmetic import allow_tf32
from train.weights.snapshot import load_snapshot

CPU = torch.device("cpu")


class MeanColours:
    """A feature network of twelve features: the mean colour of each quarter of an image."""

    name, digest = "mean colours", "0"

    def features(self, images):
        return {
            "pool": torch.nn.functional.avg_pool2d(images.float() / 255, images.shape[-1] // 2).flatten(1)
        }


def moments_of(path):
    images = torch.from_numpy(np.array(map_samples(path))).permute(0, 3, 1, 2)
    return FeatureMoments.of(MeanColours().features(images)["pool"].numpy()).gaussian()


@pytest.fixture
def real(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    return tmp_path / "real.npz"


def test_it_is_the_distance_of_the_samples_the_command_makes(dit, decoder, real, tmp_path):
    small = SmallSampleFid(
        decoder_of(load_decoder(decoder, CPU), "fp32"), real, MeanColours(), Team(), num=33
    )
    snapshot = load_snapshot(dit)
    sampler = LatentSampler(
        model=snapshot.model, latent_shape=(8, 2, 2), num_classes=3, classes=(0, 1, 2), points=4
    )
    found = small(sampler, snapshot.normalizer)
    settings = GenerationSettings(
        snapshot=dit, decoder=decoder, num_samples=33, points=4, out=tmp_path / "out"
    )
    generate(plan_of(settings))
    expected = frechet_distance(moments_of(real), moments_of(tmp_path / "out" / "samples.npz"))
    assert found == pytest.approx(expected, rel=1e-3)
    assert small(sampler, snapshot.normalizer) == pytest.approx(found, rel=1e-9)


def test_sampling_is_in_the_run_s_arithmetic_whatever_features_are_computed_in(dit, decoder, real):
    switches = []
    small = SmallSampleFid(
        decoder_of(load_decoder(decoder, CPU), "fp32"), real, MeanColours(), Team(), num=33
    )
    snapshot = load_snapshot(dit)
    snapshot.model.register_forward_hook(
        lambda *call: switches.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    sampler = LatentSampler(
        model=snapshot.model, latent_shape=(8, 2, 2), num_classes=3, classes=(0, 1, 2), points=4
    )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(allowed=True)
    try:
        small(sampler, snapshot.normalizer)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert set(switches) == {("high", True)}


def test_few_samples_are_warned_of(decoder, real, capsys):
    SmallSampleFid(decoder_of(load_decoder(decoder, CPU), "fp32"), real, MeanColours(), Team(), num=33)
    assert "FID of 33 images: no more images than the 2048 features" in capsys.readouterr().err
