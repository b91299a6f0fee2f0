"""RAEv2's decoder, noise and statistics: the image itself comes out, exact statistics go into the published file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.values.dtypes import storage_type
from shards.values.moments import RowSums
from train.models.build import build_model
from train.models.config import decoder_config
from train.models.cost import forward_flops, num_parameters
from train.models.normalizer import LatentNormalizer
from train.settings.config import TokenNoise
from train.tasks.reconstruction import noisy
from train.weights.published import load_decoder, load_statistics, save_state_dict, save_statistics

IMAGE = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}


@pytest.mark.recorded("raev2_decoder*", having="tensors")
def test_normalised_latents_become_the_recorded_image(case, decoder, assert_matches):
    model = decoder(case, **IMAGE)
    assert model.config.output == "image"
    tensors = case.tensors
    normalizer = LatentNormalizer(tensors["latent_mean"], tensors["latent_var"], eps=case.meta["eps"])
    with torch.no_grad():
        plain = tensors["z"].flatten(2).mT
        assert_matches(model(normalizer.to_tokens(tensors["z"])), tensors["image"], case.tolerance)
        assert_matches(model(plain), tensors["image_without_statistics"], case.tolerance)
        assert_matches(model.patches(plain), tensors["logits_without_statistics"], case.tolerance)


@pytest.mark.recorded("raev2_decoder*", having="tensors")
def test_published_files_are_written_and_read_back(case, decoder, tmp_path):
    model = decoder(case, **IMAGE)
    save_state_dict(model, tmp_path / "decoder.pt")
    written = torch.load(tmp_path / "decoder.pt", weights_only=True)
    assert {name: value.shape for name, value in written.items()} == {
        name: value.shape for name, value in case.state_dict("sd.").items()
    }
    assert all(torch.equal(value, case.state_dict("sd.")[name]) for name, value in written.items())
    again = load_decoder(tmp_path / "decoder.pt", model.config)
    normalizer = LatentNormalizer(case.tensors["latent_mean"], case.tensors["latent_var"])
    save_statistics(normalizer, tmp_path / "stats.pt")
    stored = torch.load(tmp_path / "stats.pt", weights_only=True)
    assert torch.equal(stored["mean"], case.tensors["latent_mean"])
    assert torch.equal(stored["var"], case.tensors["latent_var"])
    with torch.no_grad():
        tokens = load_statistics(tmp_path / "stats.pt").to_tokens(case.tensors["z"])
        assert torch.equal(again(tokens), model(normalizer.to_tokens(case.tensors["z"])))


@pytest.mark.recorded("raev2_rae_*", having="noise.z")
def test_noise_is_added_before_latents_are_normalised(case, assert_matches, monkeypatch):
    tensors = case.tensors
    draws = {"token noise scale": tensors["noise.u"].flatten(), "token noise": tensors["noise.eps"]}
    for name in ("uniform", "normal"):
        monkeypatch.setattr(f"train.tasks.reconstruction.{name}", lambda seed, what, *more: draws[what])
    (tokens,) = (
        value for name, value in tensors.items()
        if name.endswith(".z_unnormalised") and len(value) == len(tensors["noise.z"])
    )  # fmt: skip
    noise = TokenNoise(tau=case.meta["config"]["noise_tau"], distribution="uniform")
    found = noisy(tokens.flatten(2).mT, torch.arange(len(tokens)), noise, seed=0)
    normalizer = LatentNormalizer(
        tensors.get("latent_mean"), tensors["latent_var"], eps=case.meta["config"]["eps"]
    )
    assert_matches(normalizer.to_latents(found), tensors["noise.z"], case.tolerance)


@pytest.mark.recorded("raev2_latent_statistics*", having="tensors")
def test_statistics_of_shards_together_are_the_recorded_ones(case):
    rows = case.tensors["batches"].flatten(2).mT.contiguous().numpy()  # [n, h·w, C]
    first = sum(case.meta["batch_sizes"][:2])
    moments = []
    for part in (rows[:first], rows[first:]):
        sums = RowSums(rows.shape[1:], storage_type("float32"))
        sums.update(part)
        moments.append(sums.moments())
    for prefix, found in (("first_two.", moments[0]), ("", moments[0].merge(moments[1]))):
        for name, value in (("mean", found.mean), ("var", found.variance)):
            expected = case.tensors[prefix + name]
            actual = value.T.reshape(expected.shape)
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.recorded("raev2_shapes")
def test_the_published_decoder_has_its_keys_parameters_and_flops(case):
    summary = case.meta["summary"]["decoder_ViTXL_p16_256_width1024"]
    shapes = case.meta["models"]["decoder_ViTXL_p16_256_width1024"]["shapes"]
    config = decoder_config("xl", token_width=1024, grid=(16, 16), patch_size=16)
    with torch.device("meta"):
        model = build_model(config)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert num_parameters(config) == summary["params"]
    assert forward_flops(config) / 1e9 == pytest.approx(summary["gflops_fwd"], abs=0.06)
