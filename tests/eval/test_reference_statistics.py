"""The command that computes reference statistics once: its file is read where images would be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eval.generate.plan import plan_of
from eval.generate.run import generate
from eval.reference_statistics import main
from eval.settings import GenerationSettings
from shards.errors import UsageError


@pytest.mark.slow
def test_every_metric_is_the_same_against_images_and_against_their_saved_statistics(
    dit, decoder, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    saved = tmp_path / "saved.npz"
    weights = ["--feature-weights", "random:0"]
    assert main([str(tmp_path / "real.npz"), "--out", str(saved), "--image-size", "16", *weights]) == 0
    found = []
    for reference in (tmp_path / "real.npz", saved):
        settings = GenerationSettings(
            snapshot=dit, decoder=decoder, num_samples=6, points=3, out=tmp_path / reference.stem,
            reference=reference, feature_weights="random:0",
        )  # fmt: skip
        found.append(generate(plan_of(settings)))
    assert found[0]["metrics"] == found[1]["metrics"]
    assert set(found[0]["metrics"]) == {"fid", "sfid", "is", "precision", "recall"}
    assert found[1]["reference"] == {"name": "saved.npz", "kind": "samples", "count": 6}
    other = replace(settings, out=tmp_path / "other", feature_weights="random:1")
    with pytest.raises(UsageError, match="other weights"):
        generate(plan_of(other))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "--out", "x.npz"], "found nothing at nowhere"),
        ([".", "--out", "x.pt"], "must end in .npz"),
        ([".", "--out", "x.npz", "--image-size", "0"], "--image-size must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments, reason):
    with pytest.raises(UsageError, match=reason):
        main(arguments)


def test_a_folder_in_the_place_of_the_file_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        main([str(tmp_path), "--out", str(tmp_path / "x.npz")])
