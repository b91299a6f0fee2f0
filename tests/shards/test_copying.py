"""Rows of finished stores in new stores: bit for bit where nothing is to change, and never half of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from shards.errors import StoreDamagedError, UsageError
from shards.integrity.verify import verify_store
from shards.metadata.commit import CommitRecord
from shards.metadata.index import Index
from shards.metadata.layout import commit_path, field_of, fields_of
from shards.reading.store import open_store
from shards.testing.contract import (
    StoreKind,
    build_store,
    copy_store,
    encoded_row,
    expected_row,
    flip_bit,
    same_bits,
    write_shard,
)
from shards.testing.stock_readers import stock_rows
from shards.writing.copying import begin_copy, copied_recipe, copy_rows
from shards.writing.revisions import begin_revision
from shards.writing.selection import Part, every_row, reshuffled
from shards.writing.store_writer import StoreWriter

KIND = StoreKind(num_images=11, num_shards=3, bad={4: "bad"})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("source") / "store", replace(KIND, dtype="bfloat16"))


def dealt(store, num_shards, images=None):
    images = np.arange(store.plan.num_images) if images is None else images
    return reshuffled([Part(store, images)], store.class_names, num_shards, store.recipe.seed)


def copied(selection, out, own_code=None, **changes):
    writer, _ = begin_copy(selection, out, copied_recipe(selection, **changes), own_code)
    copy_rows(selection, writer, {})
    return open_store(out)


def row_of(store, view, name, row):
    reader = store.reader(view, name)
    out = np.empty((1, *reader.row_shape), reader.dtype)
    reader.read([row], out)
    return out[0]


def content_of(path):
    """Every object but those that hold times of writing or the provenance."""
    times = ("commits", "manifest.json")
    files = [p for p in path.rglob("*") if p.is_file() and p.relative_to(path).parts[0] not in times]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize(("form", "compression"), [("webdataset", None), ("zarr", "blosc"), ("zarr", "zstd")])
def test_rows_go_to_another_form_and_back_bit_for_bit(source, tmp_path, form, compression):
    codecs = {"compression": compression, "image_compression": compression}
    there = copy_store(source, tmp_path / "there", format=form, **codecs)
    for view in source.views:
        for name in source.recipe.fields(view):
            ours, theirs = stock_rows(source, view, name), stock_rows(there, view, name)
            assert all(same_bits(ours[row], theirs[row]) for row in source.valid_rows.tolist())
    assert there.recipe.encoder.id == source.recipe.encoder.id
    back = copy_store(there, tmp_path / "back", format="zarr", compression=None, image_compression=None)
    assert content_of(back.path) == content_of(source.path)
    assert back.manifest.provenance["copied from"] == there.manifest.digest


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("num_shards", [1, 4, 11])
def test_resharded_rows_keep_key_label_numbers_and_reason(tmp_path, dtype, num_shards):
    store = build_store(tmp_path / "store", replace(KIND, dtype=dtype))
    other = copied(dealt(store, num_shards), tmp_path / "other", store.code)
    assert verify_store(other.path) == []
    assert other.recipe.source_digest == store.recipe.source_digest
    old_rows = dict(zip(store.plan.keys, store.plan.rows.tolist(), strict=True))
    table = other.index.table("row", "key", "label", "valid", "reason").to_pylist()
    assert len(table) == 11
    for line in table:
        old = old_rows[line["key"]]
        assert line["label"] == store.labels[old]
        assert line["valid"] == (old != 4)
        if old == 4:
            assert line["reason"] == "bad"
            continue
        for view in store.views:
            for field in fields_of(store.recipe, view):
                assert same_bits(row_of(other, view, field.name, line["row"]), expected_row(field, old))
    for one, same in zip(store.statistics().mean.flat, other.statistics().mean.flat, strict=True):
        assert one == pytest.approx(same, rel=1e-12)
    if dtype == "int8":
        np.testing.assert_allclose(other.code_error("flip"), store.code_error("flip"), rtol=1e-12)


def test_resharding_and_back_gives_the_same_objects(source, tmp_path):
    there = copied(dealt(source, 5), tmp_path / "there")
    back = copied(dealt(there, 3), tmp_path / "back")
    assert content_of(back.path) == content_of(source.path)


def test_a_row_that_only_one_view_lacks_stays_in_the_others(tmp_path):
    kind = replace(KIND, bad={})
    build_store(tmp_path / "store", replace(kind, views=("center",)))
    begin_revision(
        tmp_path / "store", replace(open_store(tmp_path / "store").recipe, views=("center", "flip"))
    )
    writer = StoreWriter.open(tmp_path / "store")
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad={1: "only here"})
    writer.finalize()
    store = open_store(tmp_path / "store")
    copy = copied(dealt(store, 2), tmp_path / "copy")
    assert copy.index.table("reason")["reason"].to_pylist().count("flip: only here") == 1
    assert copy.manifest.num_valid == 10
    kept = sum(
        CommitRecord.from_bytes((copy.path / commit_path("center", s)).read_bytes(), path="").num_rows
        for s in (0, 1)
    )
    assert kept == 11


def test_another_storage_type_is_rounded_once(tmp_path):
    store = build_store(tmp_path / "store", replace(KIND, dtype="float32"))
    other = copied(dealt(store, 2), tmp_path / "other", dtype="float16")
    field = field_of(store.recipe, "flip", "tokens")
    old_rows = dict(zip(store.plan.keys, store.plan.rows.tolist(), strict=True))
    for row, key in zip(other.plan.rows.tolist(), other.plan.keys, strict=True):
        if old_rows[key] != 4:
            expected = encoded_row(field, old_rows[key]).astype(np.float16)
            assert same_bits(row_of(other, "flip", "tokens", row), expected)
    assert verify_store(other.path) == []


def test_int8_of_another_code_is_coded_again_and_its_error_grows(tmp_path):
    first = build_store(tmp_path / "first", replace(KIND, dtype="int8"))
    shifted = replace(first.code, table=first.code.table * np.float32(1.5))
    part = Part(first, np.arange(11))
    selection = reshuffled([part], first.class_names, 2, 0)
    other = copied(selection, tmp_path / "other", shifted, code=shifted.digest)
    assert other.code.digest == shifted.digest
    assert (other.code_error("center") > first.code_error("center")).all()
    assert verify_store(other.path) == []


def test_an_error_that_nobody_knows_stays_unknown(tmp_path):
    store = build_store(tmp_path / "store", replace(KIND, dtype="int8", bad={}))
    writer = StoreWriter.create_or_continue(tmp_path / "copy", store.recipe, store.plan, store.code)
    for view, shard in writer.pending():
        with writer.shard(view, shard) as output:
            for place, row in enumerate(store.plan.rows_of(shard)):
                output.write(place, {n: row_of(store, view, n, row) for n in store.recipe.fields(view)})
            output.leave_error_unknown()
            output.publish()
    writer.finalize()
    again = copied(dealt(open_store(tmp_path / "copy"), 2), tmp_path / "again", store.code)
    assert np.isnan(again.code_error("center")).all()
    assert np.isfinite(store.code_error("center")).all()


def test_an_interrupted_copy_continues(source, tmp_path, monkeypatch):
    publish_left = [3]
    begin = StoreWriter.shard

    def interrupted(self, *args, **kwargs):
        publish_left[0] -= 1
        if publish_left[0] < 0:
            raise KeyboardInterrupt
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(StoreWriter, "shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_store(source, tmp_path / "copy", format="webdataset")
    monkeypatch.undo()
    selection = every_row(source)
    writer, left = begin_copy(selection, tmp_path / "copy", copied_recipe(selection, format="webdataset"))
    told = []
    copy_rows(selection, writer, {}, told.append)
    assert left == sum(told) == 10
    assert verify_store(tmp_path / "copy") == []
    before = (tmp_path / "copy" / "manifest.json").read_bytes()
    assert begin_copy(selection, tmp_path / "copy", copied_recipe(selection, format="webdataset"))[1] == 0
    copy_rows(selection, writer, {"again": "yes"})
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == before


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from shards.writing.copying import begin_copy, copied_recipe, copy_rows
from shards.writing.revisions import begin_revision
from shards.writing.selection import Part, reshuffled
from shards.reading.store import open_store
store = open_store(sys.argv[1])
selection = reshuffled([Part(store, np.arange(store.plan.num_images))], store.class_names, 7, 0)
writer, _ = begin_copy(selection, Path(sys.argv[2]), copied_recipe(selection))
print("begun", flush=True)
copy_rows(selection, writer, {})
"""


def test_copies_killed_at_any_moment_equal_an_uninterrupted_one_and_leave_their_source(source, tmp_path):
    """SIGKILL at growing moments, until one run comes through."""
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.path.rglob("*") if p.is_file()}
    whole = copied(dealt(source, 7), tmp_path / "whole")
    kills = 0
    for delay in (0.0, 0.01, 0.02, 0.04, 10.0):
        run = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(source.path), str(tmp_path / "copy")], stdout=subprocess.PIPE
        )
        assert run.stdout.readline() == b"begun\n"
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.001)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.communicate()
    assert kills >= 1
    assert run.returncode == 0
    for temporary in (tmp_path / "copy").rglob(".*.tmp"):
        temporary.unlink()
    assert content_of(tmp_path / "copy") == content_of(whole.path)
    assert verify_store(tmp_path / "copy") == []
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.path.rglob("*") if p.is_file()}
    assert after == before


def test_what_cannot_be_is_refused_before_anything_is_written(source, tmp_path):
    selection = every_row(source)
    with pytest.raises(UsageError, match="compression is zarr's own"):
        copied_recipe(selection, format="webdataset", compression="zstd")
    with pytest.raises(UsageError, match="format must be one of zarr, webdataset"):
        copied_recipe(selection, format="hdf5")


def test_a_damaged_row_is_not_copied(source, tmp_path):
    shutil.copytree(source.path, tmp_path / "damaged")
    flip_bit(tmp_path / "damaged/flip/tokens/c/2/0/0", 100)
    with pytest.raises(StoreDamagedError, match="row 8 of shard 2 of flip/tokens"):
        copied(dealt(open_store(tmp_path / "damaged"), 2), tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_the_index_is_read_as_often_for_many_shards_as_for_few(source, tmp_path, monkeypatch):
    read = []
    checksums = Index.checksums
    monkeypatch.setattr(
        Index, "checksums", lambda index, path: (read.append(path), checksums(index, path))[1]
    )
    copied(dealt(source, 1), tmp_path / "few")
    few = sorted(read)
    read.clear()
    copied(dealt(source, 11), tmp_path / "many")
    assert sorted(read) == few
    assert set(few) == {"center/tokens", "center/image", "flip/tokens"}


@pytest.mark.parametrize("path", ["center/tokens", "center/image", "flip/tokens"])
def test_a_row_that_is_not_the_one_it_was_copied_from_is_found_before_the_manifest(
    source, tmp_path, monkeypatch, path
):
    selection = dealt(source, 4)
    writer, _ = begin_copy(selection, tmp_path / "copy", copied_recipe(selection))
    old_rows = dict(zip(source.plan.keys, source.plan.rows.tolist(), strict=True))
    old = old_rows[selection.plan.keys[7]]
    checksums = Index.checksums

    def other(index, asked):
        found = checksums(index, asked)
        if asked == path and not writer.pending():  # all rows were read and written
            found[old] ^= 1
        return found

    monkeypatch.setattr(Index, "checksums", other)
    with pytest.raises(StoreDamagedError, match=f"does not hold row {old} of {path}"):
        copy_rows(selection, writer, {})
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_what_the_disk_gives_back_wrongly_is_found_before_the_manifest(source, tmp_path):
    selection = every_row(source)
    writer, _ = begin_copy(selection, tmp_path / "copy", copied_recipe(selection, format="webdataset"))
    told = []

    def damage(rows):
        told.append(rows)
        if rows and sum(told) == 22:  # all rows are written, and the last shard is about to be published
            flip_bit(tmp_path / "copy/center/00000.tar", 5000)

    with pytest.raises(StoreDamagedError, match=r"center/00000.tar does not read back as it was written"):
        copy_rows(selection, writer, {}, damage)
    assert not (tmp_path / "copy" / "manifest.json").exists()
