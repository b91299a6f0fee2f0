"""PSNR and SSIM against recorded reference numbers, closed forms and scikit-image."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import structural_similarity

from eval.metrics.similarity import psnr, ssim


def _noise(seed, size=24, count=2):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def test_psnr_and_ssim_are_the_recorded_ones(rae_fixtures):
    found = [
        path
        for path in rae_fixtures.glob("*.json")
        if json.loads(path.read_text()).get("fixture") == "image_metrics"
    ]
    assert found
    for path in found:
        arrays, facts = load_file(path.with_suffix(".safetensors")), json.loads(path.read_text())
        a, b = (arrays[name].permute(0, 3, 1, 2) for name in "ab")
        # The recorded numbers were computed in float32.
        assert psnr(a, b).mean().item() == pytest.approx(facts["psnr"], abs=1e-5)
        assert ssim(a, b).mean().item() == pytest.approx(facts["ssim"], abs=2e-6)
        assert psnr(a, a).mean().item() == facts["psnr_identical"]


def test_psnr_of_a_constant_error_has_a_closed_form():
    a = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(a, a + 10).item() == pytest.approx(20 * np.log10(255 / 10))


def test_each_pair_is_judged_alone():
    a, b = _noise(0), _noise(1)
    together = ssim(a, b), psnr(a, b)
    assert together[0][1].item() == pytest.approx(ssim(a[1:], b[1:]).item())
    assert together[1][1].item() == pytest.approx(psnr(a[1:], b[1:]).item())


def test_identical_images_are_wholly_similar():
    assert ssim(_noise(2), _noise(2)).tolist() == pytest.approx([1, 1])


def test_ssim_in_the_interior_is_scikit_images():
    a = _noise(3, count=1)
    b = (a.float() * 0.7 + 20).to(torch.uint8)
    # With two flat border strips of six pixels both rules for the border give the same windows.
    for image in (a, b):
        image[..., :6, :] = image[..., -6:, :] = 0
        image[..., :, :6] = image[..., :, -6:] = 0
    x, y = (image[0].permute(1, 2, 0).numpy() / 255.0 for image in (a, b))
    expected = structural_similarity(
        x, y, data_range=1, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, full=True
    )[1].mean()
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-9)
