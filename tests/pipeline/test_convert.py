"""Another form or storage type for the rows of a finished store."""

import numpy as np
import pytest

from shards import open_store


@pytest.fixture
def float_store(pipeline, folder, tiny, tmp_path):
    """A float32 store of 21 rows, one of them unusable."""
    (folder / "class 1" / "01.png").write_bytes(b"not an image")
    out = tmp_path / "exact"
    assert pipeline("encode", folder, "--out", out, "--shards", 3, "--dtype", "float32", *tiny)[0] == 0
    return out


def test_converting_to_int8_is_what_encoding_to_int8_would_be(float_store, pipeline, tmp_path):
    status, _, messages = pipeline(
        "convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8"
    )
    assert status == 0, messages
    exact, int8 = open_store(float_store), open_store(tmp_path / "int8")
    np.testing.assert_array_equal(exact.valid_rows, int8.valid_rows)
    np.testing.assert_array_equal(exact.labels, int8.labels)
    for view in exact.views:
        values = []
        for store in (exact, int8):
            reader = store.reader(view, "tokens")
            rows = np.empty((20, *reader.row_shape), reader.dtype)
            reader.read(store.valid_rows, rows)
            values.append(store.decode(rows).astype(np.float64))
        expected = np.sqrt(np.square(values[1] - values[0]).mean((0, 1))) / values[1].std((0, 1))
        np.testing.assert_allclose(int8.code_error(view), expected, rtol=1e-5)
        assert expected.max() < 0.02
    again = pipeline(
        "convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8"
    )
    assert again[0] == 0
    assert pipeline("verify", tmp_path / "int8")[0] == 0


def test_int8_cannot_be_assessed_or_recoded_again(float_store, pipeline, tmp_path):
    pipeline("convert", float_store, "--out", tmp_path / "int8", "--format", "zarr", "--dtype", "int8")
    for command in (
        ["assess", tmp_path / "int8"],
        ["convert", tmp_path / "int8", "--out", tmp_path / "x", "--dtype", "int8"],
    ):
        status, _, messages = pipeline(*command)
        assert status == 2
        assert "int8 tokens already" in messages
    assert pipeline("convert", tmp_path / "int8", "--out", tmp_path / "tars")[0] == 0


def test_a_store_that_is_all_that_already_is_not_copied(float_store, pipeline, tmp_path):
    status, _, messages = pipeline(
        "convert", float_store, "--out", tmp_path / "x", "--format", "zarr", "--dtype", "float32"
    )
    assert status == 2
    assert "already" in messages
