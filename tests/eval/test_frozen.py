"""LPIPS with the published linear weights, against the package they come from."""

import lpips as published
import numpy as np
import pytest
import torch

from eval.metrics.similarity import lpips
from eval.networks.frozen import load_perceptual
from train.weights.infer import PublishedFileError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return load_perceptual("random:0", CPU)


def _pictures(seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))


# The lpips package builds its VGG16 by an argument that torchvision calls old.
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_the_distance_is_that_of_the_lpips_package_with_the_same_backbone(network):
    state = network.state_dict()
    theirs = published.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for slice_name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        part = getattr(theirs.net, slice_name)
        part.load_state_dict({name: state[f"features.{name}"] for name in part.state_dict()})
    a, b = _pictures(0), _pictures(1)
    with torch.no_grad():
        expected = theirs(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(lpips(network, a, b).float(), expected, rtol=1e-4, atol=1e-6)


def test_the_distance_is_computed_in_float32_whatever_the_callers_arithmetic_is(network):
    expected = lpips(network, _pictures(0), _pictures(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(network, _pictures(0), _pictures(1)), expected)


def test_equal_pictures_have_no_distance_and_others_have_some(network):
    assert lpips(network, _pictures(0), _pictures(0)).tolist() == [0, 0]
    assert (lpips(network, _pictures(0), _pictures(1)) > 1e-3).all()


def test_the_trainers_file_of_vgg16_gives_the_distance_it_is_trained_with(network, tmp_path):
    vgg16 = {name: value for name, value in network.state_dict().items() if name.startswith("features.")}
    # What torchvision's file holds beside the convolutions plays no part.
    torch.save({**vgg16, "classifier.0.bias": torch.zeros(4)}, tmp_path / "vgg16.pth")
    loaded = load_perceptual(str(tmp_path / "vgg16.pth"), CPU)
    assert torch.equal(lpips(loaded, _pictures(0), _pictures(1)), lpips(network, _pictures(0), _pictures(1)))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(PublishedFileError, match="there is no file"):
        load_perceptual("nowhere.pth", CPU)
