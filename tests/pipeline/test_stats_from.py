"""`pipeline encode --stats-from`: readers normalise by published statistics, and the exact ones are kept."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline.encode.statistics_file import read_statistics
from shards.errors import UsageError
from shards.integrity.verify import verify_store
from shards.reading.store import open_store
from shards.testing.contract import copy_store

SHAPE = (64, 2, 2)


def some_statistics(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE).astype(np.float32), rng.uniform(0.1, 2, SHAPE).astype(np.float32)


@pytest.fixture
def published(tmp_path):
    """A statistics file as RAE publishes it: float32, no mean."""
    path = tmp_path / "stat.pt"
    torch.save({"mean": None, "var": torch.tensor(some_statistics()[1])}, path)
    return path


@pytest.fixture
def encode(folder, tmp_path, tiny, pipeline):
    """Encodes the folder into two shards; gives exit code and standard error."""

    def run(*more):
        code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny, *more)
        return code, err

    return run


def test_readers_get_the_file_s_statistics_for_every_view_and_the_exact_ones_on_demand(
    encode, tmp_path, published, pipeline
):
    assert encode("--stats-from", published)[0] == 0
    store = open_store(tmp_path / "store")
    variance = some_statistics()[1].astype(np.float64)
    for views in (None, ["center"], ["flip"], ["center", "flip"]):
        given = store.statistics(views)
        assert np.array_equal(given.variance, variance)
        assert not given.mean.any()
        assert store.statistics(views, exact=True).count == 21 * len(views or store.views)
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert (store.given_statistics.name, store.given_statistics.sha256) == ("stat.pt", digest)
    assert verify_store(store.path) == []

    facts = json.loads(pipeline("inspect", store.path, "--json")[1])
    assert facts["statistics_from_file"] == {"name": "stat.pt", "sha256": digest}
    assert facts["statistics"]["all"]["count"] == 42
    assert f"readers normalise by stat.pt, SHA-256 {digest}" in pipeline("inspect", store.path)[1]
    assert pipeline("report", store.path)[0] == 0
    assert digest in (tmp_path / "store.html").read_text()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_all_three_forms_give_the_same_numbers(encode, tmp_path, suffix):
    mean, variance = some_statistics()
    path = tmp_path / f"stat{suffix}"
    if suffix == ".npz":
        np.savez(path, mean=mean, var=variance)
    elif suffix == ".pt":
        torch.save({"mean": torch.tensor(mean), "var": torch.tensor(variance)}, path)
    else:
        save_file({"mean": mean, "var": variance}, path)
    assert encode("--stats-from", path)[0] == 0
    given = open_store(tmp_path / "store").statistics()
    assert np.array_equal(given.mean, mean.astype(np.float64))
    assert np.array_equal(given.variance, variance.astype(np.float64))


def test_the_same_file_may_be_given_again_and_another_is_refused(encode, tmp_path, published):
    assert encode("--stats-from", published)[0] == 0
    assert encode("--stats-from", published)[0] == 0
    assert encode("--stats-from", published, "--retry-quarantined")[0] == 0
    assert encode()[0] == 0
    other = tmp_path / "other.npz"
    np.savez(other, var=some_statistics(1)[1])
    for more in ((), ("--retry-quarantined",)):
        code, err = encode("--stats-from", other, *more)
        assert code == 2
        assert "was begun with the statistics of stat.pt" in err
    assert verify_store(tmp_path / "store") == []


def test_a_store_that_was_finished_without_keeps_its_own(encode, tmp_path, published):
    assert encode()[0] == 0
    code, err = encode("--stats-from", published)
    assert code == 2
    assert "train with --statistics stat.pt" in err
    assert verify_store(tmp_path / "store") == []


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"var": np.ones((64, 2, 3))}, "[D, h, w] = [64, 2, 2]; var in"),
        ({"mean": np.ones((64, 1, 1)), "var": np.ones(SHAPE)}, "holds mean [64, 1, 1]"),
        ({"mean": np.ones(SHAPE)}, "must hold 'var'"),
        ({"var": np.ones(SHAPE), "std": np.ones(SHAPE)}, "holds var, std"),
        ({"var": -np.ones(SHAPE)}, "a variance cannot be negative"),
        ({"var": np.full(SHAPE, np.nan)}, "must be finite"),
        ({"var": np.full(SHAPE, None)}, "without running code"),
    ],
)
def test_numbers_that_cannot_be_statistics_are_refused(tmp_path, arrays, complaint):
    path = tmp_path / "stat.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=re.escape(complaint)):
        read_statistics(path, SHAPE)


@pytest.mark.parametrize("name", ["nothing.pt", "stat.pkl", "text.pt", "text.npz", "text.safetensors"])
def test_files_that_are_no_statistics_are_refused(tmp_path, name):
    if name != "nothing.pt":
        (tmp_path / name).write_bytes(b"not arrays")
    with pytest.raises(UsageError, match=name):
        read_statistics(tmp_path / name, SHAPE)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_wrong_file_is_refused_in_one_line_before_anything_is_written(encode, tmp_path, dry):
    np.savez(tmp_path / "stat.npz", var=np.ones((64, 3, 3)))
    code, err = encode("--stats-from", tmp_path / "stat.npz", *dry)
    assert (code, err.count("\n")) == (2, 1)
    assert "[D, h, w] = [64, 2, 2]; var in" in err
    assert not (tmp_path / "store").exists()


def test_a_pickle_in_a_pt_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"var": Trap()}, tmp_path / "stat.pt")
    with pytest.raises(UsageError, match="without running code"):
        read_statistics(tmp_path / "stat.pt", SHAPE)
    assert not (tmp_path / "sprung").exists()


def test_a_later_rank_is_refused_with_another_file(encode, tmp_path, published, monkeypatch):
    assert encode("--stats-from", published)[0] == 0
    other = tmp_path / "other.npz"
    np.savez(other, var=some_statistics(1)[1])
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert encode("--engine", "static", "--stats-from", published)[0] == 0
    code, err = encode("--engine", "static", "--stats-from", other)
    assert (code, "was begun with the statistics of stat.pt" in err) == (2, True)


def test_other_forms_and_storage_types_keep_them(encode, tmp_path, published, pipeline):
    assert encode("--stats-from", published)[0] == 0
    copy_store(open_store(tmp_path / "store"), tmp_path / "tars", format="webdataset")
    assert (
        pipeline(
            "convert",
            tmp_path / "store",
            "--out",
            tmp_path / "wide",
            "--format",
            "zarr",
            "--dtype",
            "float32",
        )[0]
        == 0
    )
    source = open_store(tmp_path / "store")
    for copy in (open_store(tmp_path / "tars"), open_store(tmp_path / "wide")):
        assert copy.given_statistics.sha256 == source.given_statistics.sha256
        assert np.array_equal(copy.statistics().variance, source.statistics().variance)


def test_a_store_whose_given_numbers_are_lost_is_not_finished(encode, tmp_path, published):
    assert encode("--stats-from", published)[0] == 0
    store = tmp_path / "store"
    (store / "manifest.json").unlink()
    (store / "stats/from-file/variance/c/0/0/0").unlink()
    code, err = encode()
    assert code == 1
    assert "run again with --stats-from stat.pt" in err
    assert encode("--stats-from", published)[0] == 0
    assert verify_store(store) == []
