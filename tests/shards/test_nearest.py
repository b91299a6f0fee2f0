"""Finding the interval of a value gives what a binary search gives, whatever the boundaries."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shards.values.nearest import Intervals


def searched(boundaries, values):
    """By one binary search each."""
    return np.stack([np.searchsorted(own, at) for own, at in zip(boundaries, values.T, strict=True)], 1)


@settings(max_examples=200, deadline=None)
@given(
    st_numpy.arrays(np.float32, (3, 254), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st_numpy.arrays(np.float32, (7, 3), elements=st.floats(-(2.0**120), 2.0**120, width=32)),
)
def test_any_boundaries_and_values_as_a_binary_search(boundaries, values):
    boundaries = np.sort(boundaries, axis=1)
    # On a boundary, and just beside it.
    on = boundaries[:, [0, 3, 100, 252, 253]].T
    values = np.concatenate([values, on, np.nextafter(on, np.inf), np.nextafter(on, -np.inf)]).astype(
        np.float32
    )
    np.testing.assert_array_equal(Intervals(boundaries)(values), searched(boundaries, values))


def test_many_values_of_channels_of_very_different_size_and_place():
    generator = np.random.default_rng(0)
    scale = 10.0 ** generator.uniform(-6, 6, 50)
    centre = scale * generator.normal(size=50) * 1000
    draw = lambda count: (generator.standard_t(2, (count, 50)) * scale + centre).astype(np.float32)  # noqa: E731
    boundaries = np.sort(draw(254).T, axis=1)
    values = draw(20000)
    np.testing.assert_array_equal(Intervals(boundaries)(values), searched(boundaries, values))


def test_crowded_and_equal_boundaries():
    boundaries = np.zeros((2, 254), np.float32)
    boundaries[0, 200:] = 1.0
    boundaries[1] = np.linspace(0, 1e-6, 254)
    boundaries[1, -1] = 1e6
    values = np.array([[-1, -1], [0, 0], [1e-30, 5e-7], [1, 1], [2, 2e6]], np.float32)
    np.testing.assert_array_equal(Intervals(boundaries)(values), searched(boundaries, values))
