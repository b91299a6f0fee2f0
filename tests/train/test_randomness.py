"""Draws are Philox's, and depend on (seed, stream, position) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from train.models.compilation import compile_function
from train.randomness import compile_draws, normal, philox, uniform

POSITIONS = torch.tensor([5, 0, 2**33 + 7, 12])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Source: kat_vectors of the authors' Random123 distribution, philox4x32 with 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_words(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (1, 70_000)])
def test_a_sample_gets_the_same_numbers_in_every_batch(draw, shape):
    together = draw(1, "noise", POSITIONS, shape)
    assert together.shape == (4, *shape)
    assert together.dtype == torch.float32
    for i in range(4):
        alone = draw(1, "noise", POSITIONS[i : i + 1], shape)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_seed_stream_and_position_each_change_every_number(draw):
    base = draw(1, "noise", POSITIONS, (100,))
    for other in (draw(2, "noise", POSITIONS, (100,)), draw(1, "time", POSITIONS, (100,))):
        assert (base != other).float().mean() > 0.99
    assert len({tuple(row.tolist()) for row in base}) == 4


def test_numbers_follow_their_distributions():
    positions = torch.arange(200)
    assert stats.kstest(normal(0, "a", positions, (500,)).flatten().numpy(), "norm").pvalue > 1e-3
    flat = uniform(0, "a", positions, (500,)).flatten().numpy()
    assert stats.kstest(flat, "uniform").pvalue > 1e-3
    assert flat.min() >= 0
    assert flat.max() < 1


def test_samples_and_their_parts_are_uncorrelated():
    numbers = normal(0, "a", torch.arange(64), (256,)).numpy()
    for matrix in (numbers, numbers.T):
        correlations = np.corrcoef(matrix)[np.triu_indices(len(matrix), 1)]
        assert abs(correlations).max() < 6 / np.sqrt(matrix.shape[1])


@pytest.fixture
def compiled_draws():
    """Switches programs on; they are off again after the test."""
    yield lambda compiler: compile_draws(compiler)
    compile_draws(None)


SHAPES = [(uniform, ()), (normal, (3,)), (normal, (5, 7)), (normal, (2, 33_000))]


@pytest.mark.parametrize(("draw", "shape"), SHAPES)
def test_what_is_compiled_has_the_same_bits_as_the_steps(compiled_draws, draw, shape):
    step_by_step = draw(1, "noise", POSITIONS, shape)
    compiled_draws(lambda function: function)
    assert torch.equal(draw(1, "noise", POSITIONS, shape), step_by_step)


@pytest.mark.slow  # runs the compiler
@pytest.mark.parametrize(("draw", "shape"), SHAPES)
def test_compiled_draws_have_the_same_bits(compiled_draws, draw, shape):
    seeds = ((1, "noise"), (2**40, "time"))
    step_by_step = [draw(*seed, POSITIONS, shape) for seed in seeds]
    compiled_draws(compile_function)
    for seed, expected in zip(seeds, step_by_step, strict=True):
        assert torch.equal(draw(*seed, POSITIONS, shape), expected)


def test_the_values_are_frozen():
    # A change here changes every run that is continued.
    assert uniform(3, "time", torch.tensor([0, 1])).tolist() == FROZEN_UNIFORM
    torch.testing.assert_close(normal(3, "noise", torch.tensor([9]), (3,)), torch.tensor([FROZEN_NORMAL]))


FROZEN_UNIFORM = [0.6008982062339783, 0.17273610830307007]
FROZEN_NORMAL = [-1.084015, 1.956064, 0.692557]
