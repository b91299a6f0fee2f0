"""Readers: any rows into any places, on any system, with few files open, by many threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.reading.shard_file
from shards.errors import StoreDamagedError, UsageError
from shards.metadata.layout import field_of
from shards.reading.open_files import OpenFiles
from shards.reading.shard_file import READ_MODES
from shards.reading.store import Store, open_store
from shards.testing.contract import StoreKind, build_store, expected_row, flip_bit, same_bits, store_kinds


@pytest.fixture(
    scope="module",
    params=[
        StoreKind(),
        StoreKind(compression="zstd"),
        StoreKind(image_compression="blosc"),
        StoreKind(format="webdataset"),
    ],
    ids=str,
)
def store(request, tmp_path_factory) -> Store:
    return build_store(tmp_path_factory.mktemp("reader") / "store", request.param)


def expected(store, rows):
    field = field_of(store.recipe, "center", "tokens")
    return np.stack([expected_row(field, row) for row in rows])


@given(st.data())
def test_any_rows_go_to_any_places(store, data):
    rows = data.draw(st.lists(st.sampled_from(store.valid_rows.tolist()), min_size=1, max_size=30))
    places = data.draw(st.permutations(range(len(rows))))
    reader = store.reader("center", "tokens", mode=data.draw(st.sampled_from(READ_MODES)))
    out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
    reader.read(np.array(rows), out, places)
    assert same_bits(out[places], expected(store, rows))


@pytest.mark.parametrize("replacement", ["pread instead of preadv", "no word on the cache"])
def test_systems_without_preadv_or_nowait_read_the_same(store, monkeypatch, replacement):
    if replacement == "pread instead of preadv":
        monkeypatch.setattr(shards.reading.shard_file, "read_at", shards.reading.shard_file._pread)
        monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(shards.reading.shard_file, "NOWAIT", None)
    for mode in ("auto", "pread"):
        reader = store.reader("center", "tokens", mode=mode, verify="always")
        out = np.zeros((len(store.valid_rows), *reader.row_shape), reader.dtype)
        reader.read(store.valid_rows, out)
        assert same_bits(out, expected(store, store.valid_rows.tolist()))


def test_a_read_that_comes_in_parts_is_put_together(store, monkeypatch):
    monkeypatch.setattr(
        shards.reading.shard_file,
        "read_at",
        lambda descriptor, out, offset: os.preadv(descriptor, [out[:7]], offset),
    )
    reader = store.reader("center", "tokens", mode="pread")
    out = np.zeros((2, *reader.row_shape), reader.dtype)
    reader.read([1, 2], out)
    assert same_bits(out, expected(store, [1, 2]))


def test_few_open_files_are_enough_for_many_threads(store, monkeypatch):
    monkeypatch.setattr(OpenFiles, "share", lambda files: 1)
    reader = store.reader("center", "tokens")

    def read(seed):
        rows = np.random.default_rng(seed).permutation(store.valid_rows)
        out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
        reader.read(rows, out)
        return same_bits(out, expected(store, rows.tolist()))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))
    opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in open_files()}
    assert sum(path.startswith(str(store.path)) for path in opened) == 1


def open_files():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_files_are_closed_with_the_reader(store):
    before = open_files()
    reader = store.reader("center", "tokens")
    out = np.zeros((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    assert len(open_files() - before) >= 4
    del reader
    assert open_files() == before


def test_a_flipped_view_shows_the_centre_image_mirrored(store):
    reader = store.reader("flip", "image")
    out = np.zeros((3, *reader.row_shape), reader.dtype)
    reader.read([5, 0], out, at=[2, 1])
    image = field_of(store.recipe, "center", "image")
    assert same_bits(out[2], np.ascontiguousarray(expected_row(image, 5)[:, ::-1]))
    assert same_bits(out[1], np.ascontiguousarray(expected_row(image, 0)[:, ::-1]))
    assert not out[0].any()


@pytest.mark.parametrize(
    "kind", [StoreKind(), StoreKind(compression="blosc"), StoreKind(format="webdataset")], ids=str
)
def test_checksums_are_compared_first_always_or_never(tmp_path, kind):
    store = build_store(tmp_path / "store", kind)
    path = store.path / ("center/00001.tar" if kind.format == "webdataset" else "center/tokens/c/1/0/0")
    row = store.capacity
    readers = {
        v: store.reader("center", "tokens", mode="pread", verify=v) for v in ("first", "always", "never")
    }
    out = np.zeros((1, *readers["first"].row_shape), readers["first"].dtype)
    for reader in readers.values():
        reader.read([row], out)
    extent = readers["first"]._files[1].extent(0)
    flip_bit(path, 8 * (extent[0] + extent[1] - 1))
    if kind.compression is None:
        readers["first"].read([row], out)  # it was right when it was read first
        readers["never"].read([row], out)
    where = f"row {row} of shard 1 of center/tokens"
    with pytest.raises(StoreDamagedError, match=where):
        readers["always"].read([row], out)
    with pytest.raises(StoreDamagedError, match=where):
        store.reader("center", "tokens").read([row], out)


def test_a_buffer_that_does_not_fit_is_refused(store):
    reader = store.reader("center", "tokens")
    for out in (
        np.zeros((1, *reader.row_shape), np.float64),
        np.zeros((1, 5, 6), reader.dtype),
        np.zeros((2, *reader.row_shape), reader.dtype)[:, ::2],
    ):
        with pytest.raises(ValueError, match="C-contiguous"):
            reader.read([0], out)


def test_views_and_fields_a_store_does_not_have_are_refused(store):
    with pytest.raises(UsageError, match="not 'crop7'"):
        store.reader("crop7", "tokens")
    with pytest.raises(UsageError, match="has no 'depth'"):
        store.reader("center", "depth")


def test_no_store_and_a_foreign_zarr_group_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match=r"is not a store: it has no zarr.json"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UsageError, match="not a store: its attributes name no recipe"):
        open_store(tmp_path)


def test_an_object_whose_bytes_changed_is_refused_when_it_is_used(tmp_path):
    for name, use in {
        "label/c/0": lambda store: store.labels,
        "valid/c/0": lambda store: store.valid_rows,
        "plan.parquet": lambda store: store.class_names,
        "index.parquet": lambda store: store.index,
        "stats/flip/mean/c/0/0/0": lambda store: store.statistics(),
    }.items():
        store = build_store(tmp_path / name.replace("/", "-"), StoreKind(num_images=3, num_shards=1))
        flip_bit(store.path / name, 13)
        with pytest.raises(StoreDamagedError, match=f"{name} is not the file that was written"):
            use(open_store(store.path))


@given(store_kinds())
def test_a_store_of_any_kind_reads_back(tmp_path_factory, kind):
    store = build_store(tmp_path_factory.mktemp("any") / "store", kind)
    good = sorted(set(store.plan.rows.tolist()) - {int(row) for row in kind.bad})
    assert store.valid_rows.tolist() == good
    if good:
        for view in store.views:
            field = field_of(store.recipe, view, "tokens")
            reader = store.reader(view, "tokens")
            out = np.zeros((len(good), *reader.row_shape), reader.dtype)
            reader.read(good, out)
            assert same_bits(out, np.stack([expected_row(field, row) for row in good]))
