"""Further representations: their features, FDr6 and MIND against images and saved statistics, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from eval.generate.plan import plan_of
from eval.generate.run import generate
from eval.metrics import scoring
from eval.metrics.features import REPRESENTATIONS, Representation, TimmFeatures
from eval.metrics.set_distances import VALIDATION_DISTANCES
from eval.reference_statistics import main
from eval.settings import GenerationSettings
from shards.errors import UsageError

SMALL = {
    "convnext": Representation("test_convnext", 64, "mean"),
    "dinov2-256": Representation("test_vit", 32, "class token"),
    "mae": Representation("test_vit", 48, "class token"),
    "siglip": Representation("test_vit2", 32, "attention"),
    "clip": Representation("test_vit3", 32, "class token"),
}
"""Small networks of timm in the places of those of FDr6, pooled alike."""

WEIGHTS = [f"{name}=random:{number}" for number, name in enumerate(SMALL)]


@pytest.fixture
def small(monkeypatch):
    for name, row in SMALL.items():
        monkeypatch.setitem(scoring.NETWORKS, name, partial(TimmFeatures, row))


@pytest.mark.parametrize("name", SMALL)
def test_an_image_becomes_one_vector_whatever_its_size_and_company(name):
    network = TimmFeatures(SMALL[name], "random:0", torch.device("cpu"))
    images = torch.randint(
        0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = network.features(images)["embedding"]
    assert found.ndim == 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(network.features(images[1:2])["embedding"], found[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_every_space_of_fdr6_has_a_network_and_a_distance_of_real_images():
    assert scoring.SPACES.keys() == VALIDATION_DISTANCES.keys()
    assert {network for network, _ in scoring.SPACES.values()} == {"inception", *REPRESENTATIONS}


@pytest.mark.slow
def test_six_representations_agree_between_images_and_saved_statistics(dit, decoder, tmp_path, small, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    saved = tmp_path / "saved.npz"
    weights = ["--feature-weights", "random:0", "--network-weights", *WEIGHTS]
    networks = ["--networks", "inception", *SMALL]
    arguments = [str(tmp_path / "real.npz"), "--out", str(saved), "--image-size", "16", *weights, *networks]
    assert main(arguments) == 0
    found = []
    for reference in (tmp_path / "real.npz", saved):
        settings = GenerationSettings(
            snapshot=dit, decoder=decoder, num_samples=6, points=3, out=tmp_path / reference.stem,
            reference=reference, feature_weights="random:0", representation_weights=tuple(WEIGHTS),
            metrics=("fdr6", "mind6", "mind"),
        )  # fmt: skip
        found.append(generate(plan_of(settings)))
    metrics = found[0]["metrics"]
    assert metrics == found[1]["metrics"]
    for mean, part in (("fdr6", "fdr"), ("mind6", "mind")):
        parts = [metrics[f"{part}_{space}"] for space in VALIDATION_DISTANCES]
        assert metrics[mean] == pytest.approx(np.mean(parts))
    assert metrics["mind"] == metrics["mind_inception"]
    assert any("statistics of all ImageNet training images" in warning for warning in found[0]["warnings"])


def test_statistics_of_one_network_serve_its_metrics_alone(
    dit, decoder, tmp_path, small, monkeypatch, capsys
):
    monkeypatch.setitem(scoring.NETWORKS, "dinov2", partial(TimmFeatures, SMALL["mae"]))
    monkeypatch.setitem(
        scoring.METRICS,
        "fd_dinov2",
        replace(
            scoring.METRICS["fd_dinov2"],
            values=lambda sides: {"fd_dinov2": sides.frechet("embedding")},
            moments=frozenset({"embedding"}),
        ),
    )
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    saved = tmp_path / "saved.npz"
    arguments = [str(tmp_path / "real.npz"), "--out", str(saved), "--image-size", "16"]
    assert main([*arguments, "--networks", "dinov2", "--network-weights", "dinov2=random:0"]) == 0
    settings = GenerationSettings(
        snapshot=dit, decoder=decoder, num_samples=6, points=3, out=tmp_path / "out", reference=saved,
        dinov2_weights="random:0", metrics=("fd_dinov2",),
    )  # fmt: skip
    found = generate(plan_of(settings))
    against_images = replace(settings, reference=tmp_path / "real.npz", out=tmp_path / "again")
    assert found["metrics"] == generate(plan_of(against_images))["metrics"]
    with pytest.raises(UsageError, match="other weights"):
        generate(plan_of(replace(settings, dinov2_weights="random:1", out=tmp_path / "other")))


def test_weights_of_an_unknown_representation_are_refused(dit, decoder):
    settings = GenerationSettings(snapshot=dit, decoder=decoder, representation_weights=("vgg=public",))
    with pytest.raises(UsageError, match="got vgg=public"):
        plan_of(settings)
