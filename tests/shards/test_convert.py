"""Between the forms nothing changes but the form."""

from __future__ import annotations

import shutil

import pytest

from shards.convert import convert_store
from shards.errors import StoreDamagedError, UsageError
from shards.store import open_store
from shards.testing import StoreKind, build_store, flip_bit, same_bits, stock_rows
from shards.verify import verify_store
from shards.writing import StoreWriter


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("source") / "store", StoreKind(bad={4: "bad"}, dtype="bfloat16")
    )


@pytest.mark.parametrize(("form", "compression"), [("webdataset", None), ("zarr", "blosc"), ("zarr", "zstd")])
def test_rows_go_there_and_back_bit_for_bit(source, tmp_path, form, compression):
    convert_store(source.path, tmp_path / "there", format=form, compression=compression)
    there = open_store(tmp_path / "there")
    for view in source.views:
        for name in source.recipe.fields(view):
            ours, theirs = stock_rows(source, view, name), stock_rows(there, view, name)
            assert all(same_bits(ours[row], theirs[row]) for row in source.valid_rows.tolist())
    assert there.recipe.encoder.id == source.recipe.encoder.id
    assert there.valid_rows.tolist() == source.valid_rows.tolist()
    assert there.statistics().mean.tobytes() == source.statistics().mean.tobytes()
    assert there.index.table("reason").equals(source.index.table("reason"))
    convert_store(there.path, tmp_path / "back", format="zarr")
    times = ("commits", "manifest.json")
    for path in source.path.rglob("*"):
        name = path.relative_to(source.path)
        if path.is_file() and name.parts[0] not in times:
            assert (tmp_path / "back" / name).read_bytes() == path.read_bytes()


def test_an_interrupted_conversion_continues(source, tmp_path, monkeypatch):
    publish_left = [3]
    begin = StoreWriter.shard

    def interrupted(self, *args, **kwargs):
        publish_left[0] -= 1
        if publish_left[0] < 0:
            raise KeyboardInterrupt
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(StoreWriter, "shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_store(source.path, tmp_path / "copy", format="webdataset")
    monkeypatch.undo()
    told = []
    convert_store(source.path, tmp_path / "copy", format="webdataset", progress=lambda *now: told.append(now))
    assert told == [(done, 8) for done in range(4, 9)]
    assert verify_store(tmp_path / "copy") == []


def test_the_same_form_or_an_impossible_one_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="of format zarr and compression None already"):
        convert_store(source.path, tmp_path / "copy", format="zarr")
    with pytest.raises(UsageError, match="compression is zarr's own"):
        convert_store(source.path, tmp_path / "copy", format="webdataset", compression="zstd")
    with pytest.raises(UsageError, match="format must be one of zarr, webdataset"):
        convert_store(source.path, tmp_path / "copy", format="hdf5")
    assert not (tmp_path / "copy").exists()


def test_a_damaged_row_is_not_copied(source, tmp_path):
    shutil.copytree(source.path, tmp_path / "damaged")
    flip_bit(tmp_path / "damaged/flip/tokens/c/2/0/0", 100)
    with pytest.raises(StoreDamagedError, match="row 12 of shard 2 of flip/tokens"):
        convert_store(tmp_path / "damaged", tmp_path / "copy", format="webdataset")
