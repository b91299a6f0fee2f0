"""Small arrays are made and read by zarr-python in memory; what is damaged is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr

from shards.errors import StoreDamagedError
from shards.metadata.arrays import array_objects, describe_the_same, group_objects, read_array


@pytest.mark.parametrize(
    ("values", "fill"),
    [
        (np.array([3, -1, 0], np.int32), -1),
        (np.full(4, -1, np.int32), -1),
        (np.zeros(3, np.bool_), False),
        (np.full((2, 1, 2), np.nan), np.nan),
        (np.arange(6, dtype=np.float32).reshape(2, 3), np.nan),
    ],
    ids=["numbers", "all fill", "all false", "all NaN", "two dimensions"],
)
def test_an_array_is_one_chunk_that_zarr_reads_from_a_folder(tmp_path, values, fill):
    objects = array_objects("a/b", values, fill)
    chunk = "a/b/c" + "/0" * values.ndim
    assert set(objects) == {"a/b/zarr.json", chunk}, "also where zarr would leave out what is all fill"
    assert objects[chunk] == values.astype(values.dtype.newbyteorder("<")).tobytes()
    for name, content in objects.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert np.array_equal(
        zarr.open_array(tmp_path / "a" / "b")[...], values, equal_nan=values.dtype.kind == "f"
    )
    read = read_array(objects.__getitem__, "a/b")
    assert read.dtype == values.dtype
    assert np.array_equal(read, values, equal_nan=values.dtype.kind == "f")


def test_documents_of_equal_things_have_equal_bytes():
    assert group_objects("g", {"b": 1, "a": [2]}) == group_objects("g", {"a": [2], "b": 1})
    assert list(group_objects("", {})) == ["zarr.json"]


def test_a_document_may_be_worded_otherwise_and_still_describe_the_same():
    document = array_objects("a", np.zeros(3, np.int32), -1)["a/zarr.json"]
    content = json.loads(document)
    del content["storage_transformers"]
    assert describe_the_same(document, json.dumps(content).encode())
    for key, value in {"shape": [4], "fill_value": 0, "data_type": "int64", "attributes": {"x": 1}}.items():
        assert not describe_the_same(document, json.dumps({**content, key: value}).encode())
    assert not describe_the_same(document, b"nothing")
    assert not describe_the_same(document, group_objects("", {})["zarr.json"])


@pytest.mark.parametrize("damage", ["short", "no JSON", "no array"])
def test_an_array_that_is_damaged_is_refused_by_name(damage):
    objects = array_objects("label", np.arange(4, dtype=np.int32), -1)
    name, content, message = {
        "short": ("label/c/0", objects["label/c/0"][:-3], "label/c/0 has 13 bytes, its array 16"),
        "no JSON": (
            "label/zarr.json",
            b"{",
            "label/zarr.json does not hold what it must: the text: Invalid JSON",
        ),
        "no array": ("label/zarr.json", b"{}", "label/zarr.json does not hold what it must: zarr_format"),
    }[damage]
    with pytest.raises(StoreDamagedError, match=message):
        read_array({**objects, name: content}.__getitem__, "label")
