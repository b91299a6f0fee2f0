"""Adding views to a finished store: readers keep what they opened, and a kill in between leaves the old one whole."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from shards.errors import IdentityMismatchError, StoreDamagedError
from shards.integrity.verify import verify_store
from shards.metadata.manifest import Manifest
from shards.reading.store import open_store
from shards.testing.contract import ALL_KINDS, StoreKind, build_store, write_shard
from shards.writing.revisions import begin_revision, give_up_unfinished, newest_revision, superseded
from shards.writing.store_writer import StoreWriter

KIND = StoreKind(num_images=11, num_shards=3, views=("center",), bad={4: "bad"})
ADDED = ("center", "flip", "crop0")


def extend(path, views=ADDED) -> StoreWriter:
    begin_revision(path, replace(open_store(path).recipe, views=views))
    return StoreWriter.open(path)


def finish(writer, bad=KIND.bad):
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=bad)
    writer.finalize({"made by": "the second"})
    return open_store(writer.path)


def files_of(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_revision_that_another_worker_has_finished_meanwhile_is_not_begun_once_more(tmp_path):
    build_store(tmp_path / "store", KIND)
    asked = replace(open_store(tmp_path / "store").recipe, views=ADDED)
    finish(extend(tmp_path / "store"))
    before = files_of(tmp_path / "store")
    assert begin_revision(tmp_path / "store", asked) == 1
    StoreWriter.open(tmp_path / "store").finalize()
    assert files_of(tmp_path / "store") == before


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k.dtype in ("int8", "float16")], ids=str)
def test_a_view_added_later_is_as_if_it_had_been_there_from_the_start(kind, tmp_path):
    kind = replace(
        KIND,
        format=kind.format,
        dtype=kind.dtype,
        compression=kind.compression,
        image_compression=kind.image_compression,
    )
    build_store(tmp_path / "grown", kind)
    grown = finish(extend(tmp_path / "grown"))
    whole = build_store(tmp_path / "whole", replace(kind, views=ADDED))
    assert grown.recipe.id == whole.recipe.id
    assert grown.manifest.revision == 1
    for record in whole.manifest.objects:
        if record.path != "zarr.json" and not record.path.startswith("commits/"):
            name = record.path if record.path in grown.manifest.by_path else f"revisions/1/{record.path}"
            assert grown.manifest.by_path[name].digest == record.digest, record.path
    assert (tmp_path / "grown/revisions/1/zarr.json").read_bytes() == (
        tmp_path / "whole/zarr.json"
    ).read_bytes()
    assert verify_store(grown.path) == []


def test_an_open_store_reads_on_while_and_after_it_is_added_to(tmp_path):
    before = build_store(tmp_path / "store", KIND)
    old_files = files_of(before.path)
    writer = extend(before.path)
    write_shard(writer, "flip", 0)
    during = open_store(before.path)
    assert during.views == ("center",)
    assert verify_store(before.path) == []
    after = finish(writer, bad={**KIND.bad, 7: "bad in the new view only"})
    now = files_of(before.path)
    assert all(now[name] == content for name, content in old_files.items() if name != "manifest.json")
    for store in (before, during):  # opened before, first read now
        assert len(store.valid_rows) == 10
        assert store.statistics().count == 10
        assert store.index.table("reason")["reason"].null_count == 10
        tokens = np.empty((10, 6, 5), np.float16)
        store.reader("center", "tokens", verify="always").read(store.valid_rows, tokens)
    assert after.views == ADDED
    assert 7 not in after.valid_rows
    assert after.statistics(["center"]).count == 9
    assert after.manifest.provenance["made by"] == "the second"


def test_statistics_of_untouched_rows_are_carried_over_and_of_others_computed_again(tmp_path, monkeypatch):
    """A store of terabytes is not read again for a small addition."""
    build_store(tmp_path / "store", KIND)
    writer = extend(tmp_path / "store")
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=KIND.bad)
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    monkeypatch.setattr("shards.writing.finalize.shard_moments", None)  # reading shards again would fail
    writer.finalize()
    monkeypatch.undo()
    whole = build_store(tmp_path / "whole", replace(KIND, views=ADDED, bad={4: "bad", 7: "bad"}))
    other = StoreWriter.open(tmp_path / "other")
    (tmp_path / "other" / "commits/flip/00001.json").unlink()
    shutil.rmtree(tmp_path / "other" / "flip/tokens/c/1")
    lacking = finish(other, bad={4: "bad", 7: "bad"})
    assert np.array_equal(lacking.statistics(["center"]).mean, whole.statistics(["center"]).mean)
    assert np.array_equal(lacking.statistics(["center"]).variance, whole.statistics(["center"]).variance)


def test_two_different_additions_at_once_are_refused(tmp_path):
    build_store(tmp_path / "store", KIND)
    extend(tmp_path / "store", ("center", "flip"))
    assert extend(tmp_path / "store", ("center", "flip")).revision == 1
    with pytest.raises(IdentityMismatchError, match=r"views is .*give it up with `pipeline clean --give-up`"):
        extend(tmp_path / "store", ("center", "crop0"))


def test_an_addition_given_up_leaves_the_store_as_it_was_and_another_can_begin(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    before = files_of(store.path)
    writer = extend(store.path, ("center", "flip"))
    write_shard(writer, "flip", 1)
    assert give_up_unfinished(store.path) == 6
    assert files_of(store.path) == before
    assert give_up_unfinished(store.path) == 0
    assert finish(extend(store.path, ("center", "crop0"))).views == ("center", "crop0")
    assert verify_store(store.path) == []


def test_begun_again_with_the_old_or_the_new_recipe_a_store_is_the_present_one(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    grown = finish(extend(store.path))
    for recipe in (store.recipe, grown.recipe):
        writer = StoreWriter.create_or_continue(store.path, recipe, store.plan)
        assert (writer.recipe.id, writer.revision, writer.pending()) == (grown.recipe.id, 1, [])
        assert writer.finished()
        assert writer.finalize() == grown.manifest
    other = replace(store.recipe, views=("center", "crop0"))
    with pytest.raises(IdentityMismatchError, match="begun with another recipe"):
        StoreWriter.create_or_continue(store.path, other, store.plan)


def test_a_second_addition_goes_on_from_the_first(tmp_path):
    build_store(tmp_path / "store", KIND)
    first = finish(extend(tmp_path / "store", ("center", "flip")))
    second = finish(extend(tmp_path / "store", ADDED))
    assert (second.manifest.revision, newest_revision(second.path)) == (2, 2)
    assert verify_store(second.path) == []
    assert first.statistics(["flip"]).count == 10
    old = superseded(second.path, second.manifest)
    assert "index.parquet" in old
    assert "revisions/1/valid/c/0" in old
    assert not set(old) & set(second.manifest.by_path)
    for name in old:
        (second.path / name).unlink()
    assert verify_store(second.path) == []
    assert open_store(second.path).statistics().count == 30


def test_a_manifest_must_extend_what_the_store_was_begun_with(tmp_path):
    grown = build_store(tmp_path / "store", KIND)
    grown = finish(extend(grown.path))
    other = build_store(tmp_path / "other", replace(KIND, views=("crop0",)))
    shutil.copy(other.path / "zarr.json", grown.path / "zarr.json")
    with pytest.raises(StoreDamagedError, match="name different recipes: views"):
        open_store(grown.path)


def test_a_file_that_belongs_to_no_revision_is_named(tmp_path):
    build_store(tmp_path / "store", KIND)
    grown = finish(extend(tmp_path / "store"))
    (grown.path / "revisions/1/notes.txt").write_text("x")
    (grown.path / "flip/notes.txt").write_text("x")
    assert [str(problem.path) for problem in verify_store(grown.path)] == [
        "flip/notes.txt",
        "revisions/1/notes.txt",
    ]


def test_a_store_that_was_never_added_to_has_no_revision_in_its_manifest(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    content = store.manifest.to_bytes()
    assert b"revision" not in content
    for value in (b"0", b"-1", b'"1"', b"1.0", b"1"):
        edited = content.replace(b' "recipe_id"', b' "revision": ' + value + b',\n "recipe_id"')
        with pytest.raises(StoreDamagedError):
            Manifest.from_bytes(edited, path="manifest.json")
