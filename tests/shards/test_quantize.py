"""The int8 code: its error over many kinds of channel, its exactness and its limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pipeline.settings.config import ALLOWED_ERROR
from shards.values.quantize import Int8Code, fit_code, fit_levels


def draw(kind, count, seed):
    """Values of one kind of channel."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(count)
    kinds = {
        "gaussian": lambda: normal,
        "laplace": lambda: rng.laplace(size=count),
        "student-t of 6": lambda: rng.standard_t(6, count),
        "student-t of 3": lambda: rng.standard_t(3, count),
        "mean of 6 deviations": lambda: normal + 6,
        "mean of 1000 deviations": lambda: normal + 1000,
        "one in a thousand 40 times as large": lambda: np.where(
            rng.random(count) < 1e-3, 40 * normal, normal
        ),
        "log-normal": lambda: np.exp(normal),
        "uniform": lambda: rng.random(count),
        "two humps": lambda: normal + np.where(rng.random(count) < 0.5, 8, -8),
        "rectified, mostly zero": lambda: np.maximum(normal - 0.7, 0),
        "variance 0.005": lambda: normal * 0.005**0.5,
        "variance 9": lambda: normal * 3,
    }
    return kinds[kind]()


# Of values the code was not fitted on, in percent of the deviation: what was measured, with a margin.
LIMITS = {
    "gaussian": 0.72,
    "laplace": 0.95,
    "student-t of 6": 1.05,
    "student-t of 3": 1.9,
    "mean of 6 deviations": 0.72,
    "mean of 1000 deviations": 0.73,
    "one in a thousand 40 times as large": 1.85,
    "log-normal": 1.05,
    "uniform": 0.46,
    "two humps": 0.23,
    "rectified, mostly zero": 0.43,
    "variance 0.005": 0.72,
    "variance 9": 0.72,
}


def relative_error(code, values):
    """RMS error of each channel as a share of its deviation."""
    decoded = code.decode(code.encode(values)).astype(np.float64)
    return np.sqrt(((decoded - values) ** 2).mean(0)) / values.astype(np.float64).std(0)


@pytest.fixture(scope="module")
def channels():
    """A sample and fresh values, [M, D], one channel of each kind."""
    return tuple(
        np.stack([draw(kind, count, seed) for kind in LIMITS], 1).astype(np.float32)
        for count, seed in ((1 << 16, 1), (1 << 19, 2))
    )


def test_every_kind_of_channel_is_kept_within_its_limit_on_fresh_values(channels):
    sample, fresh = channels
    errors = dict(zip(LIMITS, 100 * relative_error(fit_code(sample), fresh), strict=True))
    assert {kind: error for kind, error in errors.items() if error > LIMITS[kind]} == {}
    assert max(LIMITS.values()) <= 100 * ALLOWED_ERROR


def test_scaling_a_channel_scales_its_levels(channels):
    sample, _ = channels
    values = np.sort(sample[:, 0].astype(np.float64))
    np.testing.assert_allclose(fit_levels(values * 7.0), fit_levels(values) * 7.0, rtol=1e-9)


def test_an_error_aimed_at_is_met_with_fewer_bits(channels):
    sample, fresh = channels
    fine, coarse = fit_code(sample), fit_code(sample, aim=0.018)
    tame = [i for i, kind in enumerate(LIMITS) if LIMITS[kind] < 1.1]
    errors = relative_error(coarse, fresh)[tame]
    assert errors.max() < 0.0195
    assert errors.min() > 0.016

    def entropy(code):
        _, counts = np.unique(code.encode(fresh)[:, 0], return_counts=True)
        shares = counts / counts.sum()
        return -(shares * np.log2(shares)).sum()

    # h(Gaussian) - log2(step) with step = 0.018 √12 deviations.
    assert entropy(coarse) == pytest.approx(
        0.5 * np.log2(2 * np.pi * np.e) - np.log2(0.018 * 12**0.5), abs=0.05
    )
    assert entropy(fine) > 7.4


def test_levels_reach_beyond_every_value_of_the_sample(channels):
    sample, _ = channels
    code = fit_code(sample)
    centre = np.median(sample, 0)
    two_sided = [i for i, kind in enumerate(LIMITS) if kind not in ("rectified, mostly zero", "log-normal")]
    above, below = code.table[:, -1] - centre, centre - code.table[:, 1]
    assert (above > sample.max(0) - centre)[two_sided].all()
    assert (below > centre - sample.min(0))[two_sided].all()
    assert (above > 2 * (sample.max(0) - centre))[0]


@settings(max_examples=50, deadline=None)
@given(
    st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 60), st.integers(1, 3)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.sampled_from([0.0, 0.018, 0.5]),
)
def test_any_sample_gives_a_code_that_encodes_to_the_nearest_level(sample, aim):
    code = fit_code(sample, aim=aim)
    codes = code.encode(sample)
    assert codes.min() >= -127
    levels = code.table[:, 1:].astype(np.float64)
    nearest = np.abs(levels[None] - sample[:, :, None]).min(-1)
    off = np.abs(code.decode(codes).astype(np.float64) - sample)
    # A boundary is itself rounded to float32.
    assert (off <= nearest + np.abs(levels).max() * 2e-7).all()


def test_levels_encode_to_their_own_codes_and_come_back_bit_for_bit(channels):
    code = fit_code(channels[0])
    every = np.broadcast_to(np.arange(-127, 128, dtype=np.int8)[:, None], (255, code.width))
    values = code.decode(every)
    np.testing.assert_array_equal(values, code.table[:, 1:].T)
    np.testing.assert_array_equal(code.decode(code.encode(values)), values)


def test_a_row_that_was_never_written_decodes_to_nan():
    code = fit_code(np.random.default_rng(0).standard_normal((100, 4)))
    assert np.isnan(code.decode(np.full((2, 3, 4), -128, np.int8))).all()


def test_a_constant_channel_is_kept_exactly():
    sample = np.full((1000, 2), 0.1, np.float32)
    sample[:, 1] = np.arange(1000)
    code = fit_code(sample)
    np.testing.assert_array_equal(code.decode(code.encode(sample))[:, 0], sample[:, 0])


def test_a_value_that_most_of_a_channel_shares_keeps_a_level_near_it():
    sample = draw("rectified, mostly zero", 1 << 16, 3)[:, None].astype(np.float32)
    code = fit_code(sample)
    assert abs(float(code.decode(code.encode(np.zeros((1, 1), np.float32)))[0, 0])) < 1e-3


def test_the_shape_of_the_tokens_does_not_matter_to_a_code(channels):
    sample, fresh = channels
    code = fit_code(sample)
    tokens = fresh[:96].reshape(3, 4, 8, -1)
    codes = code.encode(tokens)
    assert codes.shape == tokens.shape
    np.testing.assert_array_equal(codes.reshape(96, -1), code.encode(fresh[:96]))
    np.testing.assert_array_equal(code.decode(codes).reshape(96, -1), code.decode(code.encode(fresh[:96])))


def test_a_digest_changes_with_any_level(channels):
    code = fit_code(channels[0])
    table = code.table.copy()
    table[3, 200] = np.nextafter(table[3, 200], np.float32(np.inf))
    assert Int8Code(table).digest != code.digest
    assert Int8Code(code.table.copy()).digest == code.digest


@pytest.mark.parametrize("spoil", ["shape", "order", "infinite", "fill"])
def test_a_table_that_is_no_code_is_refused(spoil, channels):
    table = fit_code(channels[0]).table.copy()
    if spoil == "shape":
        table = table[:, :-1]
    elif spoil == "order":
        table[0, 5], table[0, 6] = table[0, 6], table[0, 5] - 1
    elif spoil == "infinite":
        table[0, -1] = np.inf
    else:
        table[:, 0] = 0
    with pytest.raises(ValueError, match="code"):
        Int8Code(table)
