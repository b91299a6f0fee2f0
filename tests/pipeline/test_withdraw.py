"""What is damaged is taken out of a store, and the command that wrote it makes it again."""

import os

import pytest

from pipeline.encode.leases import Leases, Owner
from shards.reading.store import open_store
from shards.testing.contract import flip_bit


def lasting(store):
    """Content of every file that does not say when it was written."""
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith(("commits/", "manifest", ".work"))
    }


@pytest.fixture(params=["zarr", "webdataset"])
def encoded(request, folder, tmp_path, tiny):
    """A finished store, the command that wrote it, and what it holds."""
    store = tmp_path / "store"
    command = ("encode", folder, "--out", store, "--shards", 4, "--format", request.param, *tiny)
    return store, command


def shard_file(store, view, shard):
    """A file that holds rows of a shard of a view."""
    found = open_store(store)
    inside = f"{view}/tokens/c/{shard}/0/0" if found.recipe.format == "zarr" else f"{view}/{shard:05d}.tar"
    return store / inside


def test_damaged_shards_are_taken_out_and_encoded_anew(encoded, pipeline):
    store, command = encoded
    assert pipeline(*command)[0] == 0
    whole = lasting(store)
    flipped, cut, gone = (shard_file(store, "center", shard) for shard in (0, 1, 2))
    os.truncate(cut, cut.stat().st_size - 9)
    code, _, err = pipeline(*command)
    assert code == 1
    assert "is complete" not in err
    flip_bit(flipped, 8 * 700)
    gone.unlink()
    (store / "commits" / "flip" / "00003.json").unlink()
    code, _, err = pipeline("verify", store)
    assert code == 1
    assert "add --withdraw and run the command that wrote the store again" in err
    code, _, err = pipeline("verify", store, "--withdraw")
    assert code == 0, err
    assert "4 damaged shards are taken out" in err
    assert not (store / "manifest.json").exists()
    assert not flipped.exists()
    assert shard_file_exists(store, "flip", 0, flipped), "what is sound stays"
    code, _, err = pipeline(*command)
    assert code == 0, err
    assert lasting(store) == whole
    assert pipeline("verify", store)[0] == 0


def shard_file_exists(store, view, shard, like):
    """Whether the file of another view's shard, beside one of center, is there."""
    name = like.relative_to(store).as_posix().replace("center", view, 1)
    parts = name.replace("/0/0/0", f"/{shard}/0/0")
    return (store / parts).exists()


def test_what_a_kill_left_of_a_withdrawal_is_found_again(encoded, pipeline):
    store, command = encoded
    assert pipeline(*command)[0] == 0
    whole = lasting(store)
    objects = [shard_file(store, "center", 1), shard_file(store, "flip", 2)]
    (store / "manifest.json").unlink()
    objects[0].unlink()
    os.truncate(objects[1], 100)
    (store / "commits" / "flip" / "00002.json").unlink()
    code, _, err = pipeline("verify", store)
    assert code == 1
    for path in objects:
        assert path.relative_to(store).as_posix() in err
    assert pipeline("verify", store, "--withdraw")[0] == 0
    code, _, err = pipeline(*command)
    assert code == 0, err
    assert lasting(store) == whole


def test_damaged_small_objects_are_made_anew_without_encoding(encoded, pipeline):
    store, command = encoded
    assert pipeline(*command)[0] == 0
    whole = lasting(store)
    flip_bit(store / "index.parquet", 80)
    flip_bit(store / "stats" / "center" / "mean" / "c" / "0" / "0" / "0", 80)
    (store / "label" / "c" / "0").unlink()
    assert "0 damaged shards" in pipeline("verify", store, "--withdraw")[2]
    assert pipeline(*command)[0] == 0
    assert lasting(store) == whole


def test_nothing_is_taken_out_where_something_could_not_be_made_anew(encoded, pipeline):
    store, command = encoded
    assert pipeline(*command)[0] == 0
    shard_file(store, "center", 1).unlink()
    flip_bit(store / "plan.parquet", 800)
    before = lasting(store)
    code, _, err = pipeline("verify", store, "--withdraw")
    assert code == 1
    assert "cannot be repaired by encoding: plan.parquet" in err
    assert lasting(store) == before
    assert (store / "manifest.json").exists()


def test_nothing_is_taken_out_while_somebody_is_at_work(encoded, pipeline):
    store, command = encoded
    assert pipeline(*command)[0] == 0
    shard_file(store, "center", 1).unlink()
    with Leases(store, Owner.this_process("worker 7")) as leases:
        assert leases.take("shard-00001")
        code, _, err = pipeline("verify", store, "--withdraw")
    assert code == 1
    assert "can be taken apart when nobody writes it, worker 7" in err
    assert (store / "manifest.json").exists()
