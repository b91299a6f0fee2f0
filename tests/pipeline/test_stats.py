"""`pipeline stats`: exact statistics in every layout, and how far a file is from them."""

import json

import numpy as np
import pytest
import torch

from pipeline.encode.statistics_file import read_statistics
from shards.testing.contract import StoreKind, build_store
from train.weights.published import load_statistics

SHAPE = (5, 2, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("stats") / "store", StoreKind())


def test_the_statistics_of_some_views_are_shown_as_text_and_json(store, pipeline):
    facts = json.loads(pipeline("stats", store.path, "--views", "flip", "--json")[1])
    exact = store.statistics(["flip"])
    assert (facts["views"], facts["count"]) == (["flip"], 23)
    assert facts["variance"] == exact.variance.mean()
    out = pipeline("stats", store.path)[1]
    assert "center, flip: 46 rows" in out


@pytest.mark.parametrize(
    ("name", "accuracy"), [("stat.pt", 1e-6), ("stat.npz", 0), ("deep/stat.safetensors", 0)]
)
def test_a_file_that_was_written_reads_back(store, tmp_path, pipeline, name, accuracy):
    code, _, err = pipeline("stats", store.path, "--out", tmp_path / name)
    assert (code, err) == (0, f"wrote {tmp_path / name}\n")
    again = read_statistics(tmp_path / name, SHAPE).statistics
    exact = store.statistics()
    np.testing.assert_allclose(again.mean, exact.mean, rtol=accuracy)
    np.testing.assert_allclose(again.variance, exact.variance, rtol=accuracy)


@pytest.mark.parametrize("name", ["stat.pt", "stat.safetensors"])
def test_the_trainer_reads_what_is_written(store, tmp_path, pipeline, name):
    assert pipeline("stats", store.path, "--out", tmp_path / name)[0] == 0
    normalizer = load_statistics(tmp_path / name)
    np.testing.assert_allclose(normalizer.variance, store.statistics().variance, rtol=1e-6)
    np.testing.assert_allclose(normalizer.mean, store.statistics().mean, rtol=1e-6)


def test_the_published_layout_is_float32_tensors_called_mean_and_var(store, tmp_path, pipeline):
    assert pipeline("stats", store.path, "--out", tmp_path / "stat.pt")[0] == 0
    values = torch.load(tmp_path / "stat.pt", weights_only=True)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in values.items()} == {
        "mean": (torch.float32, SHAPE),
        "var": (torch.float32, SHAPE),
    }


def test_a_comparison_says_how_much_and_where(store, tmp_path, pipeline):
    exact = store.statistics()
    mean, variance = exact.mean.copy(), exact.variance.copy()
    mean[1, 0, 2] += 3.0
    variance[4, 1, 1] *= 2
    variance[2, 0, 0] *= 0.9
    np.savez(tmp_path / "stat.npz", mean=mean, var=variance)
    out = pipeline("stats", store.path, "--against", tmp_path / "stat.npz", "--json")[1]
    against = json.loads(out)["against"]
    place = against["mean"]["largest_absolute"]
    assert (place["channel"], place["y"], place["x"]) == (1, 0, 2)
    assert place["difference"] == pytest.approx(3.0)
    assert against["mean"]["mean_absolute"] == pytest.approx(3.0 / 30)
    place = against["variance"]["largest_relative"]
    assert (place["channel"], place["y"], place["x"]) == (4, 1, 1)
    assert place["difference"] == pytest.approx(0.5)
    assert (place["store"], place["file"]) == (exact.variance[4, 1, 1], variance[4, 1, 1])
    assert list(against["variance"]["worst_channels"])[:2] == ["4", "2"]
    text = pipeline("stats", store.path, "--against", tmp_path / "stat.npz")[1]
    assert "variance differs most, relative, by 50.000% in channel 4 at y 1, x 1" in text


def test_a_published_file_without_a_mean_is_compared_in_its_variance(store, tmp_path, pipeline):
    torch.save({"mean": None, "var": torch.tensor(store.statistics().variance)}, tmp_path / "stat.pt")
    out = pipeline("stats", store.path, "--against", tmp_path / "stat.pt")[1]
    assert "mean     the file has none" in out
    assert "variance differs by 0 on average" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--views", "crop0"),
        ("--out", "stat.csv"),
        ("--out", f"{__file__}/stat.pt"),
        ("--against", "nothing.pt"),
    ],
)
def test_wrong_usage_gets_one_line(store, tmp_path, pipeline, arguments):
    code, _, err = pipeline("stats", store.path, *arguments)
    assert (code, err.count("\n")) == (2, 1)
