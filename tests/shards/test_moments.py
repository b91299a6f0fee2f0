"""Moments are exact, merge, and do not know how their rows were batched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import StoreDamagedError
from shards.values.dtypes import (
    HALF_SCALE,
    bfloat16_to_float32,
    float32_to_bfloat16,
    half_is_finite,
    half_to_scaled_float32,
    storage_type,
    to_float64,
    to_storage,
)
from shards.values.moments import Moments, RowSums

DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])


def rows_of(dtype, count, seed=0, mean=3.0):
    values = np.random.default_rng(seed).standard_normal((count, 4, 5)) * 10.0 ** np.linspace(-2, 1, 5) + mean
    return to_storage(values.astype(np.float32), storage_type(dtype))


def moments_of(rows, dtype, batches=(10**9,)):
    sums = RowSums((4, 5), storage_type(dtype))
    start, turn = 0, 0
    while start < len(rows):
        size = batches[turn % len(batches)]
        sums.update(rows[start : start + size])
        start, turn = start + size, turn + 1
    return sums.moments()


@DTYPES
@given(st.integers(0, 40), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_bits_do_not_depend_on_batches(dtype, count, batches):
    rows = rows_of(dtype, count)
    one, other = moments_of(rows, dtype), moments_of(rows, dtype, batches)
    assert (one.count, one.mean.tobytes(), one.m2.tobytes()) == (
        other.count,
        other.mean.tobytes(),
        other.m2.tobytes(),
    )


@DTYPES
@given(st.integers(1, 40), st.integers(0, 40))
def test_mean_and_variance_are_numpys(dtype, count, split):
    rows = rows_of(dtype, count)
    values = to_float64(rows, storage_type(dtype))
    merged = moments_of(rows[:split], dtype).merge(moments_of(rows[split:], dtype))
    assert merged.count == count
    np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.variance, values.var(0), rtol=1e-11, atol=1e-15)


def test_a_small_variance_survives_a_large_mean():
    rows = rows_of("float32", 500, mean=1e4)
    values = rows.astype(np.float64)
    np.testing.assert_allclose(moments_of(rows, "float32").variance, values.var(0), rtol=1e-9)


def test_moments_of_a_row_wider_than_a_tile_are_numpys(monkeypatch):
    monkeypatch.setattr("shards.values.moments._TILE", 3)
    rows = rows_of("float16", 7)
    np.testing.assert_allclose(moments_of(rows, "float16").mean, rows.astype(np.float64).mean(0), rtol=1e-13)


def test_moments_read_back_bit_for_bit():
    moments = moments_of(rows_of("float16", 9), "float16")
    again = Moments.from_bytes(moments.to_bytes(), (4, 5))
    assert (again.count, again.mean.tobytes(), again.m2.tobytes()) == (
        9,
        moments.mean.tobytes(),
        moments.m2.tobytes(),
    )


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", Moments.empty((2, 2)).to_bytes()])
def test_other_bytes_are_not_moments(content):
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        Moments.from_bytes(content, (4, 5))


def test_every_finite_float16_widens_exactly():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    widened = half_to_scaled_float32(finite).astype(np.float64) * HALF_SCALE
    assert widened.tobytes() == finite.astype(np.float64).tobytes()


def test_float16_that_are_not_finite_are_found():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert half_is_finite(every[np.isfinite(every)])
    assert not any(half_is_finite(every[i : i + 1]) for i in np.flatnonzero(~np.isfinite(every)))


def test_every_bfloat16_survives_the_way_to_float32_and_back():
    every = np.arange(2**16, dtype=np.uint16)
    back = float32_to_bfloat16(bfloat16_to_float32(every))
    numbers = ~np.isnan(bfloat16_to_float32(every))
    assert np.array_equal(back[numbers], every[numbers])
    assert np.isnan(bfloat16_to_float32(back[~numbers])).all()


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(float32_to_bfloat16(values), theirs)


def test_fills_are_no_values_a_row_could_hold():
    for name in ("float16", "bfloat16", "float32"):
        dtype = storage_type(name)
        fill = np.nan if dtype.fill == "NaN" else dtype.fill
        assert np.isnan(to_float64(np.array([fill], dtype.numpy), dtype)).all()
    assert storage_type("int8").fill == -128
