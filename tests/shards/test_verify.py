"""`verify_store` finds every kind of damage and says where it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.formats import scan_extents
from shards.integrity.problem import Problem
from shards.integrity.verify import verify_store
from shards.metadata.commit import CommitRecord
from shards.metadata.identity import Recipe
from shards.metadata.index import Index
from shards.metadata.layout import INDEX, MANIFEST, PLAN, field_of
from shards.metadata.manifest import Manifest
from shards.reading.store import Store, open_store
from shards.testing.contract import StoreKind, build_store, flip_bit
from shards.writing.published import object_record

KINDS = (
    StoreKind(bad={4: "no image"}),
    StoreKind(compression="blosc", dtype="bfloat16"),
    StoreKind(compression="zstd", image_compression="zstd"),
    StoreKind(image_compression="blosc"),
    StoreKind(format="webdataset", bad={4: "no image"}),
)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pristine(request, tmp_path_factory) -> Store:
    return build_store(tmp_path_factory.mktemp("verify") / "store", request.param)


@pytest.fixture
def store(pristine, tmp_path) -> Store:
    shutil.copytree(pristine.path, tmp_path / "store")
    return open_store(tmp_path / "store")


def objects_by_size(store: Store) -> tuple[list[Path], np.ndarray]:
    files = sorted(p for p in store.path.rglob("*") if p.is_file())
    return files, np.array([p.stat().st_size for p in files])


def assert_flips_are_found(store: Store, count: int, seed: int) -> None:
    """Half of the places are drawn by byte, half by object, so that small objects get their share."""
    files, sizes = objects_by_size(store)
    generator = np.random.default_rng(seed)
    for turn in range(count):
        file = generator.choice(len(files), p=sizes / sizes.sum() if turn % 2 else None)
        bit = int(generator.integers(sizes[file] * 8))
        path = files[file].relative_to(store.path).as_posix()
        flip_bit(files[file], bit)
        problems = verify_store(store.path)
        flip_bit(files[file], bit)
        assert [p.path for p in problems] == [path] * len(problems)
        assert problems, f"bit {bit} of {path} was flipped unnoticed"
        assert_place_is_right(store, path, bit // 8, problems)


def assert_place_is_right(store: Store, path: str, byte: int, problems: list[Problem]) -> None:
    """Where the flipped byte is a row's, exactly that row is named."""
    recipe = store.recipe
    for view in store.views:
        for name in recipe.fields(view):
            field = field_of(recipe, view, name)
            for shard in range(recipe.num_shards):
                holder = f"{view}/{shard:05d}.tar" if recipe.format == "webdataset" else None
                if path != holder and path != f"{view}/{name}/c/{shard}/" + "/".join(
                    "0" for _ in field.row_shape
                ):
                    continue
                assert all(p.shard == shard and p.view == view for p in problems)
                extents = scan_extents(store.path, recipe, field, shard)
                inside = (
                    (extents.offsets <= byte) & (byte < extents.offsets + extents.sizes) & extents.present
                )
                for place in np.flatnonzero(inside):
                    assert [p.row for p in problems] == [shard * recipe.capacity + place]


def test_a_flipped_bit_anywhere_is_found_and_placed(store):
    assert_flips_are_found(store, 10, seed=7)


@pytest.mark.slow
def test_each_of_a_thousand_flipped_bits_is_found_and_placed(store):
    assert_flips_are_found(store, 250, seed=8)


def shard_files(store: Store) -> list[Path]:
    return sorted(p for p in store.path.glob("center/**/*") if p.is_file() and p.name != "zarr.json")


def test_looking_for_damage_reads_each_column_of_the_index_once(store, monkeypatch):
    path = shard_files(store)[1]
    flip_bit(path, 8 * 5)
    read = []
    checksums = Index.checksums
    monkeypatch.setattr(
        Index, "checksums", lambda index, path: (read.append(path), checksums(index, path))[1]
    )
    assert verify_store(store.path)
    assert read
    assert len(read) == len(set(read))


def test_a_flip_between_the_numbers_of_a_tar_names_the_row_where_it_belongs_to_one(tmp_path):
    store = build_store(tmp_path / "store", StoreKind(format="webdataset"))
    path = store.path / "center/00001.tar"
    first = scan_extents(store.path, store.recipe, field_of(store.recipe, "center", "tokens"), 1).offsets[0]
    flip_bit(path, 8 * (int(first) - 600))
    assert [p.row for p in verify_store(store.path)] == [store.capacity]


def test_a_truncated_shard_is_named(store):
    path = shard_files(store)[1]
    path.write_bytes(path.read_bytes()[:-7])
    (problem,) = verify_store(store.path)
    assert problem.path == path.relative_to(store.path).as_posix()
    assert "bytes instead of" in problem.message
    assert problem.shard is not None


def test_a_missing_shard_is_named(store):
    path = shard_files(store)[0]
    path.unlink()
    (problem,) = verify_store(store.path)
    assert (problem.path, problem.message, problem.shard) == (
        path.relative_to(store.path).as_posix(),
        "is missing",
        0,
    )


def test_swapped_shards_are_both_named_with_whose_bytes_they_hold(store):
    one, other = shard_files(store)[0], shard_files(store)[-1]
    names = [p.relative_to(store.path).as_posix() for p in (one, other)]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    problems = verify_store(store.path)
    assert {p.path: p.message for p in problems} == {
        names[0]: f"holds the bytes of {names[1]}",
        names[1]: f"holds the bytes of {names[0]}",
    }


def test_an_extra_shard_is_named(store):
    extra = shard_files(store)[0]
    other = extra.with_name("99999" + extra.suffix)
    shutil.copy(extra, other)
    (problem,) = verify_store(store.path)
    assert (problem.path, problem.message) == (
        other.relative_to(store.path).as_posix(),
        "is not an object of this store",
    )


def test_what_a_dying_worker_left_is_not_a_problem(store):
    (store.path / "center" / f".00000.tar.{'0' * 32}.tmp").write_bytes(b"half a shard")
    assert verify_store(store.path) == []


def test_an_edited_manifest_is_refused(store):
    manifest = json.loads((store.path / MANIFEST).read_bytes())
    manifest["num_valid"] += 1
    (store.path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    (problem,) = verify_store(store.path)
    assert problem.path == MANIFEST
    assert "edited or damaged" in problem.message


def with_new_digests(store: Store, *paths: str, **changes: object) -> None:
    """Make the manifest agree with edited objects, as somebody would who wants to hide an edit."""
    fresh = {path: object_record(store.path, path) for path in paths}
    objects = tuple(fresh.get(o.path, o) for o in store.manifest.objects)
    manifest = replace(store.manifest, objects=objects, **changes)
    (store.path / MANIFEST).write_bytes(manifest.to_bytes())


def test_an_edited_index_is_found_even_under_a_manifest_made_to_fit(store):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = store.index.table()
    keys = pa.array(table["key"].to_pylist()[::-1])
    pq.write_table(table.set_column(table.column_names.index("key"), "key", keys), store.path / INDEX)
    with_new_digests(store, INDEX)
    (problem,) = verify_store(store.path)
    assert (problem.path, problem.message) == (INDEX, "does not follow from the plan and the commit records")


def test_an_edited_plan_is_found_even_under_a_manifest_made_to_fit(store):
    import pyarrow.parquet as pq

    table = pq.read_table(store.path / PLAN)
    other = [f"other{i}" for i in range(len(table))]
    pq.write_table(table.set_column(0, "key", [other]), store.path / PLAN)
    with_new_digests(store, PLAN)
    (problem,) = verify_store(store.path)
    assert (problem.path, problem.message) == (PLAN, "is not the plan of the recipe")


def test_a_changed_label_array_is_found_even_under_a_manifest_made_to_fit(store):
    flip_bit(store.path / "label/c/0", 0)
    with_new_digests(store, "label/c/0")
    assert [p.path for p in verify_store(store.path)] == ["label/c/0"]


def test_a_shard_that_is_not_its_commit_records_is_found_even_under_a_manifest_made_to_fit(store):
    path = shard_files(store)[0].relative_to(store.path).as_posix()
    flip_bit(store.path / path, 5)
    with_new_digests(store, path)
    assert [(p.path, p.shard) for p in verify_store(store.path)] == [(path, 0)]


def test_a_wrong_count_of_valid_images_is_found(store):
    with_new_digests(store, num_valid=store.manifest.num_valid - 1, num_bad=store.manifest.num_bad + 1)
    assert [p.path for p in verify_store(store.path)] == [MANIFEST]


def test_a_manifest_of_another_recipe_is_found(store):
    recipe = Recipe.from_dict({**store.recipe.to_dict(), "precision": "bfloat16"})
    (store.path / MANIFEST).write_bytes(replace(store.manifest, recipe=recipe).to_bytes())
    assert "precision" in verify_store(store.path)[0].message


def test_progress_ends_at_all_bytes(store):
    seen: list[tuple[int, int]] = []
    verify_store(store.path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(o.nbytes for o in store.manifest.objects)


def test_an_unfinished_store_is_named_unfinished(store):
    (store.path / MANIFEST).unlink()
    (problem,) = verify_store(store.path)
    assert "not finished" in str(problem)


def test_every_object_of_a_store_is_in_its_manifest(pristine):
    files = {p.relative_to(pristine.path).as_posix() for p in pristine.path.rglob("*") if p.is_file()}
    assert files == set(Manifest.read(pristine.path).by_path) | {MANIFEST}


def test_a_commit_record_reads_back_as_it_was_written(pristine):
    path = pristine.path / "commits/center/00000.json"
    record = CommitRecord.from_bytes(path.read_bytes(), path=path)
    assert record.to_bytes() == path.read_bytes()
