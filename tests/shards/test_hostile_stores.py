"""Small files of a store that claim what no file can hold: refused by arithmetic, before anything is allocated."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numcodecs
import numpy as np
import pytest

from shards.errors import StoreDamagedError
from shards.formats.webdataset_format import WebdatasetFormat
from shards.formats.zarr_format import ZarrFormat
from shards.integrity.verify import verify_store
from shards.metadata.arrays import array_objects, read_array
from shards.metadata.commit import CommitRecord
from shards.metadata.compression import row_codec
from shards.metadata.identity import Recipe
from shards.metadata.layout import fields_of
from shards.metadata.plan import Plan
from shards.metadata.root import read_recipe
from shards.reading.store import open_store
from shards.storage.checksum import crc32c
from shards.storage.folder import LocalObject
from shards.storage.remote_calls import RemoteError
from shards.testing.contract import StoreKind, build_store, make_plan, make_recipe
from shards.values.moments import Moments
from shards.writing.finalize import found_commits
from shards.writing.store_writer import StoreWriter

KIND = StoreKind(num_images=5, num_shards=2, views=("center",), image_size=0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    return {
        name: build_store(root / name, dataclasses.replace(KIND, format=name))
        for name in ("zarr", "webdataset")
    }


@pytest.mark.parametrize(
    "size", [b"-0000000512", b"-0000001024", b"77777777777", b"          4", b"000_0000512"]
)
def test_a_tar_header_of_an_impossible_size_ends_the_walk(stores, tmp_path, size):
    content = bytearray((stores["webdataset"].path / "center/00000.tar").read_bytes())
    content[124:135] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "00000.tar").write_bytes(content)
    field = fields_of(stores["webdataset"].recipe, "center")[0]
    with LocalObject(tmp_path / "00000.tar") as source, pytest.raises(StoreDamagedError, match="tar header"):
        WebdatasetFormat().read_extents(source, field, 0, 3)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(2**63 - 1, 60), (2**63, 60), (2**64 - 60, 60), (2**64 - 2, 60), (0, 2**64 - 2), (2**62, 2**62)],
)
def test_an_index_whose_sums_wrap_is_refused(stores, tmp_path, offset, nbytes):
    content = bytearray((stores["zarr"].path / "center/tokens/c/0/0/0").read_bytes())
    index = np.frombuffer(bytes(content[-52:-4]), "<u8").reshape(3, 2).copy()
    index[0] = offset, nbytes
    content[-52:] = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    (tmp_path / "shard").write_bytes(content)
    field = fields_of(stores["zarr"].recipe, "center")[0]
    for compression in (None, "zstd"):
        kind = dataclasses.replace(field, compression=compression)
        with (
            LocalObject(tmp_path / "shard") as source,
            pytest.raises(StoreDamagedError, match="outside its rows"),
        ):
            ZarrFormat().read_extents(source, kind, 0, 3)


@pytest.mark.parametrize("name", ["blosc", "zstd"])
def test_a_compressed_row_never_unpacks_to_more_than_a_row(name):
    codec, out = row_codec(name), np.empty(1000, np.uint8)
    large = np.frombuffer(codec.encode(np.zeros(1 << 24, np.uint8)), np.uint8)
    with pytest.raises(ValueError, match="16777216 bytes"):
        codec.decode(large, out)
    row = np.arange(1000).astype(np.uint8)
    codec.decode(np.frombuffer(codec.encode(row), np.uint8), out)
    assert (out == row).all()


@pytest.mark.parametrize("count", [1, 100, 255, 256, 257, 65_791, 65_792, 70_000])
def test_what_a_frame_claims_is_read_whatever_its_header_is_like(count):
    codec, out = row_codec("zstd"), np.empty(count, np.uint8)
    row = np.random.default_rng(0).integers(0, 256, count, np.uint8)
    codec.decode(np.frombuffer(codec.encode(row), np.uint8), out)
    assert (out == row).all()


def test_a_frame_that_claims_less_than_it_holds_is_refused():
    stored = bytearray(numcodecs.Zstd(1).encode(np.zeros(60_000, np.uint8)))
    stored[5:7] = (1000 - 256).to_bytes(2, "little")
    with pytest.raises((RuntimeError, ValueError)):
        row_codec("zstd").decode(np.frombuffer(bytes(stored), np.uint8), np.empty(1000, np.uint8))


def test_an_array_of_astronomic_shape_is_refused():
    objects = array_objects("label", np.zeros(4, np.int32), -1)
    document = json.loads(objects["label/zarr.json"])
    document["shape"] = document["chunk_grid"]["configuration"]["chunk_shape"] = [10**15]
    objects["label/zarr.json"] = json.dumps(document).encode()
    with pytest.raises(StoreDamagedError, match="has 16 bytes, its array 4000000000000000"):
        read_array(objects.__getitem__, "label")


def test_partial_sums_of_astronomic_shape_are_refused():
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    with pytest.raises(StoreDamagedError, match="partial sums"):
        Moments.from_bytes(buffer.getvalue(), (6, 5))


def changed(values, path, value):
    """A copy of JSON values with one of them replaced, by its keys."""
    copy = json.loads(json.dumps(values))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("num_shards",), 10**13, "num_shards|shards"),
        (("num_images",), "5", "num_images"),
        (("num_images",), 5.0, "num_images"),
        (("num_shards",), True, "num_shards"),
        (("seed",), None, "seed"),
        (("views",), "center", "views"),
        (("views",), [1], "views"),
        (("dtype",), ["float16"], "dtype"),
        (("code_error",), float("nan"), "finite"),
        (("image_size",), 10**9, "image size"),
        (("encoder", "width"), 10**12, "width"),
        (("encoder", "width"), "5", "width"),
        (("encoder", "grid"), [2], "grid"),
        (("encoder", "grid"), [10**9, 10**9], "grid"),
        (("encoder", "name"), 7, "name"),
        (("encoder",), [], "EncoderIdentity"),
    ],
)
def test_a_recipe_of_wrong_values_is_refused_with_its_key(stores, path, value, named):
    with pytest.raises(StoreDamagedError, match=named):
        Recipe.from_dict(changed(stores["zarr"].recipe.to_dict(), path, value))


def test_an_unfinished_store_of_more_shards_than_its_plan_is_refused(stores, tmp_path):
    for name in ("zarr.json", "plan.parquet"):
        (tmp_path / name).write_bytes((stores["zarr"].path / name).read_bytes())
    document = json.loads((tmp_path / "zarr.json").read_bytes())
    document["attributes"]["recipe"] |= {"num_shards": 10**13, "num_images": 10**14}
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    assert read_recipe(tmp_path).num_shards == 10**13
    with pytest.raises(StoreDamagedError, match=r"plan\.parquet"):
        StoreWriter.open(tmp_path)
    assert [problem.path for problem in verify_store(tmp_path)] == ["manifest.json", "plan.parquet"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("shard",), 10**13, "no shard"),
        (("shard",), "0", "shard"),
        (("num_rows",), -1, "num_rows"),
        (("bad",), {"99": "gone"}, "slots"),
        (("bad",), {"x": "gone"}, "readable"),
        (("crc32c", "tokens"), "AAAA", "crc32c|readable|buffer"),
        (("crc32c", "tokens"), "AAAAAA==", "3 numbers"),
        (("crc32c",), [], "crc32c"),
        (("objects",), [{"path": "../x", "nbytes": 1, "sha256": ""}], "relative path"),
        (("objects",), 3, "objects"),
        (("version",), [], "version"),
        (("square_error",), "AAAAAAAAAAA=", "square_error"),
    ],
)
def test_a_commit_record_of_wrong_values_is_refused_with_its_key(stores, path, value, named):
    store = stores["zarr"]
    record = json.loads((store.path / "commits/center/00000.json").read_bytes())
    with pytest.raises(StoreDamagedError, match=f"00000.json.*({named})"):
        CommitRecord.from_bytes(
            json.dumps(changed(record, path, value)).encode(), path="00000.json"
        ).require_fits(store.recipe, path="00000.json")


BROKEN = (b"", b"{", b"[" * 200_000, b'{"a":' * 200_000, b"null", b"[]", b"\xff\xfe", b"NaN")


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:8]))
@pytest.mark.parametrize(
    "name", ["zarr.json", "manifest.json", "commits/center/00000.json", "label/zarr.json"]
)
def test_documents_that_are_none_are_named_in_one_line(stores, tmp_path, name, content):
    store = open_store(shutil.copytree(stores["zarr"].path, tmp_path / "store"))
    (store.path / name).write_bytes(content)
    read = {
        "zarr.json": lambda: read_recipe(store.path),
        "manifest.json": lambda: open_store(store.path),
        "commits/center/00000.json": lambda: found_commits(store.path, store.recipe),
        "label/zarr.json": lambda: read_array(lambda path: (store.path / path).read_bytes(), "label"),
    }[name]
    with pytest.raises(StoreDamagedError, match=name) as refused:
        read()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("content", [b"null", b"[]", b"{}", b"[" * 1000, b'{"zarr_format": 3}', b"\xff"])
def test_an_unfinished_store_whose_array_documents_say_something_else_is_not_finished_with_them(
    tmp_path, content
):
    kind = StoreKind(num_images=4, num_shards=2, views=("center",))
    plan = make_plan(kind)
    StoreWriter.create_or_continue(tmp_path / "store", make_recipe(kind, plan), plan)
    document = tmp_path / "store/center/tokens/zarr.json"
    document.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=f"{document} does not describe the array"):
        StoreWriter.create_or_continue(tmp_path / "store", make_recipe(kind, plan), plan)
    document.unlink()
    build_store(tmp_path / "store", kind)
    assert verify_store(tmp_path / "store") == []


def test_a_plan_of_more_rows_than_bytes_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 2_000_000
    columns = {
        "key": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["k" * 60_000])),
        "label": pa.array(np.zeros(count, np.int32)),
        "uri": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["u"])),
        "offset": pa.array(np.zeros(count, np.int64)),
        "nbytes": pa.array(np.zeros(count, np.int64)),
    }
    settings = {"version": 1, "num_shards": 1, "seed": 0, "class_names": []}
    table = pa.table(columns).replace_schema_metadata({"shards.plan": json.dumps(settings)})
    pq.write_table(table, tmp_path / "plan.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "plan.parquet").stat().st_size < 1 << 17
    with pytest.raises(StoreDamagedError, match="claims 2000000 rows"):
        Plan.read(tmp_path / "plan.parquet")


def test_a_server_that_does_not_answer_is_unreachable_and_not_damaged(stores, monkeypatch):
    def silent(path):
        raise RemoteError(f"reading {path} failed 5 times; see whether the server runs")

    monkeypatch.setattr("shards.metadata.manifest.read_object", silent)
    with pytest.raises(RemoteError, match="server runs"):
        verify_store(stores["zarr"].path)
