"""Feature networks: seeded weights, files, the published layers, and agreement with torch-fidelity."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics.features import DinoFeatures, InceptionFeatures
from eval.metrics.moments import FeatureMoments
from eval.metrics.set_distances import frechet_distance, inception_score, precision_recall
from shards.errors import UsageError, UserError
from train.engine.arithmetic import allow_tf32

CPU = torch.device("cpu")
TINY_VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def inception():
    return InceptionFeatures("random:0", CPU)


def _images(count, seed, size=32):
    """Smooth pictures of clearly different colours and contrasts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR)) for image in coarse]
    )


def _features(network, images):
    return network.features(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_inception_gives_the_published_layers(inception):
    found = _features(inception, _images(2, 0))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 7 * 17 * 17),
        "logits": (2, 1008),
    }
    assert all(value.dtype == torch.float32 for value in found.values())
    assert (found["spatial"] >= 0).all()


def test_spatial_features_are_the_first_channels_of_the_fourth_block_row_by_row(inception):
    captured = []
    hook = inception.network.Mixed_6d.register_forward_hook(lambda *call: captured.append(call[2]))
    found = _features(inception, _images(1, 1))["spatial"]
    hook.remove()
    block = captured[0][0]
    assert block.shape == (768, 17, 17)
    expected = [block[channel, 3, 5].item() for channel in range(7)]
    assert found.view(17, 17, 7)[3, 5].tolist() == expected


def test_logits_leave_the_bias_out(inception):
    found = _features(inception, _images(1, 2))
    expected = found["pool"] @ inception.network.fc.weight.T
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_batch(inception):
    images = _images(4, 3)
    together, alone = _features(inception, images)["pool"], _features(inception, images[2:3])["pool"]
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


def test_a_weights_file_gives_the_same_network_as_its_seed(inception, tmp_path):
    state = inception.network.state_dict()
    save_file(state, tmp_path / "inception.safetensors")
    torch.save(state, tmp_path / "inception.pth")
    for name in ("inception.safetensors", "inception.pth"):
        assert InceptionFeatures(str(tmp_path / name), CPU).digest == inception.digest


def test_set_metrics_agree_with_torch_fidelity_on_the_same_features():
    rng = np.random.default_rng(9)
    real, generated = (
        torch.from_numpy((rng.standard_normal((count, 48)) * 1.5 + 0.3).astype(np.float32))
        for count in (90, 70)
    )
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (generated, real)), verbose=False)
    theirs |= isc_features_to_metric(generated, splits=7, shuffle=False)
    theirs |= prc_features_to_metric(generated, real, prc_neighborhood=3, prc_batch_size=40, verbose=False)
    moments = [FeatureMoments.of(found.numpy()).gaussian() for found in (real, generated)]
    assert frechet_distance(*moments) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    score = inception_score(generated.numpy(), split_size=10)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert precision_recall(real, generated) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-6
    )


@pytest.mark.slow
def test_metrics_agree_with_torch_fidelity_on_the_same_images_and_weights(inception, tmp_path):
    # Larger class logits, so that the Inception Score of random weights says something.
    state = {name: value.clone() for name, value in inception.network.state_dict().items()}
    state["fc.weight"] *= 30
    torch.save(state, tmp_path / "weights.pth")
    inception = InceptionFeatures(str(tmp_path / "weights.pth"), CPU)
    sets = {"real": _images(60, 4), "generated": _images(48, 5)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{number:03}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        fid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        isc_splits=3,
        samples_shuffle=False,
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=6,
        save_cpu_ram=True,  # its data loader then starts no workers
    )
    real, generated = (_features(inception, sets[name]) for name in ("real", "generated"))
    moments = [FeatureMoments.of(found["pool"].numpy()).gaussian() for found in (real, generated)]
    assert frechet_distance(*moments) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    score = inception_score(generated["logits"].numpy(), split_size=16)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score > 1.001
    precision, recall = precision_recall(real["pool"], generated["pool"])
    assert precision == pytest.approx(theirs["precision"], rel=1e-4)
    assert recall == pytest.approx(theirs["recall"], rel=1e-4)


def _switches():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["inception", "dino"])
def test_features_are_computed_in_float32_whatever_the_callers_arithmetic_is(name, inception):
    network = inception if name == "inception" else DinoFeatures("random:1", CPU, model=TINY_VIT)
    images, inside, before = _images(2, 8), [], _switches()
    expected = _features(network, images)
    hook = network.network.register_forward_hook(lambda *call: inside.append(_switches()))
    try:
        allow_tf32(allowed=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = _features(network, images)
        assert inside == [("highest", False)]
        assert _switches() == ("high", True)
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert found.keys() == expected.keys()
    for feature, values in expected.items():
        assert torch.equal(found[feature], values), feature


def test_dino_features_are_the_class_token_of_the_resized_images():
    network = DinoFeatures("random:1", CPU, model=TINY_VIT)
    found = _features(network, _images(2, 6, size=48))["cls"]
    assert found.shape == (2, 192)
    assert found.dtype == torch.float32
    assert not torch.allclose(found[0], found[1])
    assert network.name == TINY_VIT


def test_the_digest_tells_weights_apart():
    digests = {DinoFeatures(f"random:{seed}", CPU, model=TINY_VIT).digest for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    save_file({"head": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit a VisionTransformer; missing: "):
        DinoFeatures(str(tmp_path / "other.safetensors"), CPU, model=TINY_VIT)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save(pytest.importorskip, tmp_path / "code.pth")
    with pytest.raises(UserError, match="which is no tensor"):
        DinoFeatures(str(tmp_path / "code.pth"), CPU, model=TINY_VIT)


@pytest.mark.parametrize(
    ("weights", "reason"), [("random:x", "need a seed"), ("nowhere.pth", "found no file nowhere")]
)
def test_unusable_weights_are_refused(weights, reason):
    with pytest.raises(UsageError, match=reason):
        DinoFeatures(weights, CPU, model=TINY_VIT)
