"""Draws on a CUDA device: compiled they keep their bits, and uniform ones are the CPU's."""

import pytest
import torch

from train.models.compilation import compile_function
from train.randomness import compile_draws, normal, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POSITIONS = torch.tensor([5, 0, 2**33 + 7, 12])


@pytest.fixture
def compiled():
    """A function that gives what another gives while draws are compiled."""

    def run(draw):
        compile_draws(compile_function)
        try:
            return draw()
        finally:
            compile_draws(None)

    return run


@pytest.mark.parametrize("shape", [(), (5, 7), (768, 16, 16)])
def test_compiled_normals_have_the_bits_of_the_steps_on_the_device(compiled, shape):
    positions = POSITIONS.cuda()
    expected = normal(1, "noise", positions, shape)
    assert torch.equal(compiled(lambda: normal(1, "noise", positions, shape)), expected)


@pytest.mark.parametrize("shape", [(), (5, 7)])
def test_compiled_uniform_numbers_are_the_cpu_s(compiled, shape):
    expected = uniform(2**40, "time", POSITIONS, shape)
    assert torch.equal(compiled(lambda: uniform(2**40, "time", POSITIONS.cuda(), shape)).cpu(), expected)
