"""Shards and metadata are, byte for byte, those of zarr-python, and TensorStore reads them too."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tensorstore
import zarr
import zarr.codecs

from shards.errors import StoreDamagedError
from shards.formats import object_path, scan_extents
from shards.formats.zarr_format import ZarrShardFile
from shards.metadata.arrays import sharded_array_objects
from shards.metadata.layout import field_of, fields_of
from shards.testing.contract import StoreKind, build_store, expected_row, make_plan, make_recipe, same_bits

KINDS = [
    StoreKind(format="zarr", dtype=dtype, compression=compression, image_compression=compression)
    for dtype in ("float16", "bfloat16", "float32")
    for compression in (None, "blosc", "zstd")
]


def zarr_python_array(path, field, kind, capacity):
    compressors = {
        None: None,
        "blosc": zarr.codecs.BloscCodec(
            typesize=field.dtype.numpy.itemsize,
            cname="zstd",
            clevel=1,
            shuffle="bitshuffle",
        ),
        "zstd": zarr.codecs.ZstdCodec(level=1),
    }
    return zarr.create_array(
        path,
        shape=(capacity * kind.num_shards, *field.row_shape),
        dtype=field.dtype.numpy,
        shards=(capacity, *field.row_shape),
        chunks=(1, *field.row_shape),
        compressors=compressors[kind.compression],
        filters=None,
        fill_value=np.nan if field.dtype.fill == "NaN" else field.dtype.fill,
        attributes={"dtype": field.dtype.logical},
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("missing", [(), (5,), (0, 2, 5)], ids=["full", "partial", "holes"])
def test_a_shard_is_byte_for_byte_zarr_pythons(tmp_path, kind, missing):
    kind = replace(kind, num_images=6, num_shards=1)
    recipe = make_recipe(kind, make_plan(kind))
    for field in fields_of(recipe, "center"):
        array = zarr_python_array(tmp_path / "theirs" / field.name, field, kind, 6)
        rows = np.array(array[:])
        with ThreadPoolExecutor(1) as pool:
            file = ZarrShardFile(tmp_path / "ours" / field.name, field, recipe, pool)
            for place in sorted(set(range(6)) - set(missing)):
                rows[place] = expected_row(field, place)
                file.write(place, rows[place : place + 1])
            file.finish()
            file.output.publish()
        array[:] = rows
        theirs = tmp_path / "theirs" / field.name / "c" / "/".join(["0"] * (1 + len(field.row_shape)))
        assert file.output.final.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_metadata_means_what_zarr_pythons_means(tmp_path, kind):
    recipe = make_recipe(kind, make_plan(kind))
    for field in fields_of(recipe, "center"):
        zarr_python_array(tmp_path / field.name, field, kind, recipe.capacity)
        theirs = json.loads((tmp_path / field.name / "zarr.json").read_bytes())
        (ours,) = sharded_array_objects(field, recipe.capacity, kind.num_shards).values()
        assert json.loads(ours) == theirs


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensorstore_reads_every_field_of_every_view(tmp_path, kind):
    store = build_store(tmp_path / "store", kind)
    for view in store.views:
        for field in fields_of(store.recipe, view):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / field.path)}}
            array = tensorstore.open(spec, open=True, read=True).result().read().result()
            for row in store.valid_rows.tolist():
                assert same_bits(array[row], expected_row(field, row))


def test_a_stock_reader_needs_nothing_but_zarr_for_labels_validity_and_statistics(tmp_path):
    store = build_store(tmp_path / "store", StoreKind(bad={4: "bad"}))
    group = zarr.open_group(store.path, mode="r")
    assert np.array_equal(group["label"][:], store.labels)
    assert np.flatnonzero(group["valid"][:]).tolist() == store.valid_rows.tolist()
    assert np.array_equal(group["stats/center/mean"][:], store.statistics(["center"]).mean)
    assert group["stats/center"].attrs["count"] == store.statistics(["center"]).count
    assert group.attrs["recipe"]["num_images"] == 23


@pytest.fixture
def shard(tmp_path):
    store = build_store(tmp_path / "store", StoreKind())
    field = field_of(store.recipe, "center", "tokens")
    return store, field, store.path / object_path(store.recipe, field, 1)


def test_an_index_that_fails_its_checksum_is_refused(shard):
    store, field, path = shard
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreDamagedError, match="index fails its checksum"):
        scan_extents(store.path, store.recipe, field, 1)


@pytest.mark.parametrize("length", [0, 3, 60])
def test_a_shard_shorter_than_its_index_is_refused(shard, length):
    store, field, path = shard
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StoreDamagedError, match="index fails its checksum"):
        scan_extents(store.path, store.recipe, field, 1)


@pytest.mark.parametrize(("offset", "size"), [(0, 61), (2**62, 60), (2**64 - 2, 60), (400, 60)])
def test_an_index_that_points_outside_the_rows_is_refused(shard, offset, size):
    from shards.storage.checksum import crc32c

    store, field, path = shard
    content = path.read_bytes()
    index = np.frombuffer(content[-100:-4], "<u8").copy()
    index[:2] = offset, size
    path.write_bytes(content[:-100] + index.tobytes() + crc32c(index).to_bytes(4, "little"))
    with pytest.raises(StoreDamagedError, match="points outside its rows"):
        scan_extents(store.path, store.recipe, field, 1)
