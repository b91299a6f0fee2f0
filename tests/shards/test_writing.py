"""Writing a store: the first publication wins, anything can be interrupted, and bad requests are refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import IdentityMismatchError, StoreError, StoreIncompleteError, UsageError
from shards.integrity.verify import verify_store
from shards.metadata.commit import CommitRecord
from shards.metadata.identity import Recipe
from shards.metadata.layout import commit_path
from shards.metadata.manifest import Manifest
from shards.reading.store import open_store
from shards.testing.contract import StoreKind, build_store, make_plan, make_recipe, write_shard
from shards.writing.published import describe_shard
from shards.writing.store_writer import StoreWriter, stale_temporaries

KIND = StoreKind(num_images=11, num_shards=3, bad={2: "bad", 5: "bad"})
FORMS = pytest.mark.parametrize("form", ["zarr", "webdataset"])


def begin(path, kind=KIND) -> StoreWriter:
    plan = make_plan(kind)
    return StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan)


def content_of(path):
    """Every object but those that hold times of writing."""
    times = ("commits", "manifest.json")
    files = [p for p in path.rglob("*") if p.is_file() and p.relative_to(path).parts[0] not in times]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(request, tmp_path_factory):
    """A store written in one go."""
    kind = replace(KIND, format=request.param)
    return kind, build_store(tmp_path_factory.mktemp("whole") / "store", kind)


def test_a_store_finished_by_several_workers_in_any_order_is_the_same(whole, tmp_path):
    kind, store = whole
    workers = [begin(tmp_path / "store", kind) for _ in range(3)]
    pending = workers[0].pending()
    for turn, (view, shard) in enumerate(pending[::-1]):
        write_shard(workers[turn % 3], view, shard, bad=kind.bad, block=1 + turn % 4)
    workers[1].finalize()
    assert content_of(tmp_path / "store") == content_of(store.path)


def test_a_store_begun_with_sha256_is_continued_and_checked_with_it(tmp_path):
    plan = make_plan(KIND)
    recipe = make_recipe(KIND, plan)
    path = tmp_path / "store"
    begun = StoreWriter.create_or_continue(path, replace(recipe, object_digest="sha256"), plan)
    write_shard(begun, "center", 0, bad=KIND.bad)
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=KIND.bad)
    writer.finalize()
    assert verify_store(path) == []
    store = open_store(path)
    assert store.recipe.id == recipe.id
    assert {record.algorithm for record in store.manifest.objects} == {"sha256"}
    assert b'"format_version": 1,' in (path / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json"])
def test_a_store_whose_version_is_not_its_recipes_is_refused(tmp_path, name):
    store = build_store(tmp_path / "store", KIND)
    digests = {record.algorithm for record in store.manifest.objects if "/c/" in record.path[6:]}
    assert "blake3" in digests
    path = store.path / name
    content = path.read_bytes()
    assert b'"format_version": 2' in content
    path.write_bytes(content.replace(b'"format_version": 2', b'"format_version": 1'))
    with pytest.raises(StoreError, match="version"):
        open_store(store.path)
    path.write_bytes(content.replace(b'"format_version": 2', b'"format_version": 3'))
    with pytest.raises(StoreError, match="format version 3"):
        open_store(store.path)


def test_the_commit_record_is_what_the_published_bytes_say(whole):
    _, store = whole
    for view in store.views:
        for shard in range(3):
            path = store.path / commit_path(view, shard)
            record = CommitRecord.from_bytes(path.read_bytes(), path=path)
            reasons = dict.fromkeys(range(4), "bad")
            described, _ = describe_shard(
                store.path, store.recipe, store.plan, view, shard, reasons=reasons, square_error=None
            )
            same = replace(described, seconds=record.seconds, attempts=record.attempts)
            assert same.to_bytes() == record.to_bytes()


def test_the_loser_drops_its_copy_and_records_the_winners(whole, tmp_path):
    """The second writer holds other numbers, and its record still describes the first's file."""
    kind, _ = whole
    writer = begin(tmp_path / "store", kind)
    write_shard(writer, "flip", 1, bad=kind.bad)
    record_path = tmp_path / "store" / commit_path("flip", 1)
    first = CommitRecord.from_bytes(record_path.read_bytes(), path=record_path)
    published = (tmp_path / "store" / first.objects[0].path).read_bytes()
    record_path.unlink()  # as if the first had died between its objects and its record
    with writer.shard("flip", 1) as output:
        for place in range(4):
            output.write(place, {"tokens": np.full((6, 5), 7, np.float16)})
        second = output.publish()
    assert (tmp_path / "store" / first.objects[0].path).read_bytes() == published
    assert second.objects == first.objects
    assert second.moments == first.moments
    assert np.array_equal(second.crc32c["tokens"], first.crc32c["tokens"])
    assert set(second.bad) == set(first.bad)
    assert stale_temporaries(tmp_path / "store") == []


def test_a_row_that_one_view_lacks_counts_in_no_statistics(tmp_path):
    kind = replace(KIND, bad={})
    writer = begin(tmp_path / "one", kind)
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad={1: "only here"} if view == "flip" else {})
    writer.finalize()
    both = build_store(tmp_path / "both", replace(KIND, bad={1: "everywhere"}))
    lacking = open_store(tmp_path / "one")
    assert lacking.valid_rows.tolist() == both.valid_rows.tolist()
    for views in (("center",), ("flip",), ("center", "flip")):
        one, other = lacking.statistics(views), both.statistics(views)
        assert one.count == other.count
        assert np.array_equal(one.mean, other.mean)
        assert np.array_equal(one.variance, other.variance)


def test_finalizing_twice_is_finalizing_once(tmp_path):
    writer = begin(tmp_path / "store")
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=KIND.bad)
    first = writer.finalize({"host": "a"})
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    assert begin(tmp_path / "store").finalize({"host": "b"}) == first
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before
    assert begin(tmp_path / "store").pending() == []


def test_lost_or_damaged_partial_sums_are_computed_again(whole, tmp_path):
    kind, store = whole
    writer = begin(tmp_path / "store", kind)
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=kind.bad)
    (tmp_path / "store/moments/center/00000.npy").unlink()
    (tmp_path / "store/moments/flip/00001.npy").write_bytes(b"damaged")
    writer.finalize()
    assert content_of(tmp_path / "store") == content_of(store.path)


def test_an_unfinished_store_can_be_neither_finalized_nor_opened(tmp_path):
    writer = begin(tmp_path / "store")
    write_shard(writer, "center", 0, bad=KIND.bad)
    assert len(writer.pending()) == 5
    with pytest.raises(StoreIncompleteError, match="1 of 6 shards"):
        writer.finalize()
    with pytest.raises(StoreIncompleteError, match="not finished"):
        open_store(tmp_path / "store")


@FORMS
def test_a_shard_without_a_good_image_is_still_a_shard(tmp_path, form):
    kind = replace(KIND, format=form, bad=dict.fromkeys(range(4), "bad"))
    store = build_store(tmp_path / "store", kind)
    assert store.valid_rows.min() == 4
    assert verify_store(store.path) == []


@FORMS
def test_there_are_exactly_as_many_shard_files_as_were_asked_for(tmp_path, form):
    store = build_store(tmp_path / "store", replace(KIND, num_shards=7, format=form))
    if form == "zarr":
        for field in ("center/tokens", "center/image", "flip/tokens"):
            shards = [p for p in (store.path / field / "c").rglob("*") if p.is_file()]
            assert len(shards) == 7
    else:
        assert len(list((store.path / "center").iterdir())) == 7


KILLED = """
import sys
from pathlib import Path
from shards.testing.contract import StoreKind, write_shard, make_plan, make_recipe
from shards.writing.store_writer import StoreWriter
kind = StoreKind(num_images=24, num_shards=8, bad={2: "bad", 5: "bad"}, format=sys.argv[2])
plan = make_plan(kind)
writer = StoreWriter.create_or_continue(Path(sys.argv[1]), make_recipe(kind, plan), plan)
print("ready", flush=True)
for view, shard in writer.pending():
    write_shard(writer, view, shard, bad=kind.bad)
writer.finalize({"made by": "a test"})
"""


def kill_and_continue(path, form, num_kills, seed) -> None:
    generator = np.random.default_rng(seed)
    command = [sys.executable, "-c", KILLED, str(path), form]
    for _ in range(num_kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as output:
            output.readline()
            time.sleep(generator.exponential(0.03))
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("form", "num_kills"), [
    ("zarr", 2), ("webdataset", 1),
    pytest.param("zarr", 25, marks=pytest.mark.slow), pytest.param("webdataset", 25, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_killed_and_continued_store_is_the_uninterrupted_one(tmp_path, form, num_kills):
    kind = StoreKind(num_images=24, num_shards=8, bad={2: "bad", 5: "bad"}, format=form)
    kill_and_continue(tmp_path / "killed", form, num_kills, seed=num_kills)
    for temporary in stale_temporaries(tmp_path / "killed"):
        (tmp_path / "killed" / temporary).unlink()
    whole = build_store(tmp_path / "whole", kind)
    assert content_of(tmp_path / "killed") == content_of(whole.path)
    assert verify_store(tmp_path / "killed") == []


@FORMS
def test_two_processes_that_write_the_same_store_at_once_finish_one_store(tmp_path, form):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), form]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert verify_store(tmp_path / "store") == []
    kind = StoreKind(num_images=24, num_shards=8, bad={2: "bad", 5: "bad"}, format=form)
    assert content_of(tmp_path / "store") == content_of(build_store(tmp_path / "whole", kind).path)


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    begin(tmp_path / "store")
    for change, words in (
        ({"dtype": "float32"}, "dtype is 'float16', the other has 'float32'"),
        ({"image_size": 16}, "image_size is 8, the other has 16"),
        ({"grid": (3, 2)}, r"encoder.grid is \[2, 3\], the other has \[3, 2\]"),
    ):
        with pytest.raises(IdentityMismatchError, match=words):
            begin(tmp_path / "store", replace(KIND, **change))


def test_other_images_or_another_seed_are_refused(tmp_path):
    begin(tmp_path / "store")
    with pytest.raises(IdentityMismatchError, match="other source images or another seed"):
        begin(tmp_path / "store", replace(KIND, num_images=12))


def test_a_folder_that_holds_other_things_is_refused(tmp_path):
    (tmp_path / "photograph.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="new or empty folder"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["photograph.jpg"]


def test_a_plan_that_is_not_the_recipes_is_refused(tmp_path):
    plan = make_plan(KIND)
    recipe = make_recipe(KIND, plan)
    with pytest.raises(UsageError, match="the plan has"):
        StoreWriter.create_or_continue(tmp_path / "store", recipe, make_plan(KIND, seed=1))
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    writer = begin(tmp_path / "store")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StoreError, match=r"No space left on device.*run the same command again"):
        write_shard(writer, "center", 0, bad=KIND.bad)
    monkeypatch.undo()
    assert stale_temporaries(tmp_path / "store") == []
    assert len(writer.pending()) == 6
    write_shard(writer, "center", 0, bad=KIND.bad)
    assert len(writer.pending()) == 5


def test_leaving_a_shard_unpublished_removes_what_was_written(tmp_path):
    writer = begin(tmp_path / "store")
    with writer.shard("flip", 0) as output:
        output.write(0, {"tokens": np.zeros((6, 5), np.float16)})
        assert len(stale_temporaries(tmp_path / "store")) == 1
    assert stale_temporaries(tmp_path / "store") == []


def row(value=0.0):
    return {"tokens": np.full((6, 5), value, np.float16)}


@pytest.mark.parametrize(
    ("arrays", "place", "message"),
    [
        ({}, 0, "needs the field 'tokens'"),
        ({"tokens": np.zeros((6, 5), np.float32)}, 0, "takes rows of \\(6, 5\\) float16"),
        ({"tokens": np.zeros((5, 6), np.float16)}, 0, "got \\(5, 6\\)"),
        (
            {**row(), "image": np.zeros((8, 8, 3), np.uint8)},
            0,
            "the same number of rows of each of \\['tokens'\\]",
        ),
        (row(), 4, "stay within 0 to 4, got 4 to 5"),
        (row(), -1, "slots must ascend"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path, arrays, place, message):
    with begin(tmp_path / "store").shard("flip", 0) as output, pytest.raises(ValueError, match=message):
        output.write(place, arrays)


def test_places_must_ascend_and_all_be_accounted_for(tmp_path):
    with begin(tmp_path / "store").shard("flip", 0) as output:
        output.write(1, row())
        with pytest.raises(ValueError, match="must ascend"):
            output.write(1, row())
        with pytest.raises(ValueError, match="slot 0 is not"):
            output.publish()
        with pytest.raises(ValueError, match="no image at slot 4"):
            output.quarantine(4, "spare")


def test_a_place_cannot_be_both_written_and_bad(tmp_path):
    with begin(tmp_path / "store").shard("flip", 0) as output:
        for place in range(4):
            output.write(place, row())
        output.quarantine(2, "bad")
        with pytest.raises(ValueError, match="slot 2 is not"):
            output.publish()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "NaN or infinity as float16; check the weights"),
        (np.inf, "infinity as float16, which ends at 65504; store bfloat16"),
        (-np.inf, "infinity as float16, which ends at 65504; store bfloat16"),
    ],
)
def test_tokens_that_are_not_numbers_are_never_published(tmp_path, value, what):
    writer = begin(tmp_path / "store")
    with writer.shard("flip", 0) as output:
        for place in range(4):
            output.write(place, row(value if place == 2 else 1.0))
        with pytest.raises(StoreError, match=what):
            output.publish()
    assert len(writer.pending()) == 6


def test_int8_waits_for_its_code(tmp_path):
    plan = make_plan(KIND)
    recipe = Recipe.from_dict({**make_recipe(KIND, plan).to_dict(), "dtype": "int8"})
    with pytest.raises(UsageError, match="written with a code"):
        StoreWriter.create_or_continue(tmp_path / "store", recipe, plan)


def test_objects_are_flushed_before_they_get_their_names(tmp_path, monkeypatch):
    """What is recorded outlives a power cut: files are flushed before their link, and folders after it."""
    writer = begin(tmp_path / "store")
    events = []
    link = os.link
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    monkeypatch.setattr(os, "link", lambda a, b: (events.append(("link", str(a), str(b))), link(a, b)))
    write_shard(writer, "flip", 1, bad={5: "bad"})
    links = [index for index, event in enumerate(events) if event[0] == "link"]
    assert len(links) == 3
    for index in links:
        _, temporary, final = events[index]
        assert temporary in events[:index]
        assert str(Path(final).parent) in events[index:]
    assert events[links[-1]][2].endswith("commits/flip/00001.json")


def test_only_temporary_names_are_called_stale(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    stale = store.path / "center" / f".zarr.json.{'a' * 32}.tmp"
    stale.touch()
    (store.path / "center" / ".mine.tmp").touch()
    assert [store.path / name for name in stale_temporaries(store.path)] == [stale]


def test_a_copied_store_is_the_same_store(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    shutil.move(store.path, tmp_path / "elsewhere")
    again = open_store(tmp_path / "elsewhere")
    assert again.recipe.id == store.recipe.id
    assert Manifest.read(again.path).digest == store.manifest.digest


def test_a_reason_is_said_once_if_it_is_the_same_in_all_views(tmp_path):
    writer = begin(tmp_path / "store", StoreKind(num_images=11, num_shards=1))
    write_shard(writer, "center", 0, bad={2: "torn", 5: "torn", 7: "torn"})
    write_shard(writer, "flip", 0, bad={2: "torn", 5: "lost"})
    writer.finalize()
    reasons = open_store(tmp_path / "store").index.table("reason")["reason"].to_pylist()
    expected = {2: "torn", 5: "center: torn; flip: lost", 7: "center: torn"}
    assert reasons == [expected.get(place) for place in range(11)]
