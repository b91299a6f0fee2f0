"""LPIPS and DINO from files in their published layouts."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from train.tasks.frozen_networks import linear_weights, load_dino_features, load_perceptual
from train.weights.infer import PublishedFileError


@pytest.fixture(scope="module")
def vgg16_state():
    """torchvision's own VGG16, which is what its published file holds; without its large classifier's values."""
    with torch.device("meta"):
        names = torchvision.models.vgg16().state_dict()
    torch.manual_seed(0)
    return {
        key: 0.02 * torch.randn(value.shape) if key.startswith("features.") else torch.zeros(1)
        for key, value in names.items()
    }


@pytest.fixture(scope="module")
def dino_state():
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch8_224.dino", num_classes=0).state_dict()


def test_a_vgg16_file_of_torchvision_becomes_lpips_with_the_published_linear_weights(tmp_path, vgg16_state):
    torch.save(vgg16_state, tmp_path / "vgg16.pth")
    model = load_perceptual(tmp_path / "vgg16.pth")
    assert torch.equal(model.features[28].weight, vgg16_state["features.28.weight"])
    assert torch.equal(model.get_parameter("lin4.model.1.weight"), linear_weights()["lin4.model.1.weight"])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_lpips_agrees_with_the_lpips_package(tmp_path, vgg16_state):
    lpips = pytest.importorskip("lpips.pretrained_networks")
    torch.save(vgg16_state, tmp_path / "vgg16.pth")
    ours = load_perceptual(tmp_path / "vgg16.pth")
    theirs = lpips.torch.nn.Sequential(*ours.features)
    images, others = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    taps, x, y = [], (images - ours.shift) / ours.scale, (others - ours.shift) / ours.scale
    from lpips import normalize_tensor

    for index, layer in enumerate(theirs):
        x, y = layer(x), layer(y)
        if index in (3, 8, 15, 22, 29):
            taps.append((normalize_tensor(x) - normalize_tensor(y)) ** 2)
    weights = linear_weights()
    expected = sum(
        torch.nn.functional.conv2d(tap, weights[f"lin{index}.model.1.weight"]).mean((1, 2, 3))
        for index, tap in enumerate(taps)
    )
    assert torch.allclose(ours(images, others), expected, rtol=1e-5, atol=1e-6)


def test_equal_black_pictures_have_distance_zero_and_a_gradient_of_numbers(tmp_path, vgg16_state):
    torch.save({k: torch.zeros_like(v) for k, v in vgg16_state.items()}, tmp_path / "vgg16.pth")
    model = load_perceptual(tmp_path / "vgg16.pth")
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = model(images, torch.zeros(1, 3, 32, 32))
    distance.sum().backward()
    assert distance.item() == 0
    assert torch.isfinite(images.grad).all()


def test_a_dino_file_becomes_features_without_the_keys_bias(tmp_path, dino_state):
    torch.save({**dino_state, "x_scale": torch.ones(1, 3, 1, 1)}, tmp_path / "dino.pth")
    features = load_dino_features(tmp_path / "dino.pth")
    query, key, value = features.vit.state_dict()["blocks.3.attn.qkv.bias"].view(3, -1)
    stored = dino_state["blocks.3.attn.qkv.bias"].view(3, -1)
    assert not key.any()
    assert torch.equal(query, stored[0])
    assert torch.equal(value, stored[2])
    assert not features.train().training
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert [tuple(found.shape) for found in maps] == [(1, 384, 784)] * 5


def test_missing_and_unknown_keys_are_listed(tmp_path, dino_state):
    state = dict(dino_state)
    state["head.weight"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(PublishedFileError, match=r"missing: norm\.bias; not known: head\.weight"):
        load_dino_features(tmp_path / "dino.pth")
