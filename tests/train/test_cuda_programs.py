"""Programs of ours that only a GPU runs are at least written and translated for one here."""

from functools import partial

import pytest
import torch
from cuda_translation import translated_kernels

from pipeline.encode.sums import add_rows
from train import randomness
from train.engine.update import advance

POSITIONS, KEY = torch.arange(512), torch.tensor([1, 2])


def update(weight, gradient, mean, square, average, numbers, bad):
    parts = ([part] for part in (weight, gradient, mean, square))
    advance(*parts, [[average]], numbers, bad, betas=(0.9, 0.95), eps=1e-8, moves=(5e-4,))


PROGRAMS = {
    "normals": (randomness._polar, [POSITIONS, KEY, torch.arange(1024)]),
    "a single number": (randomness._fractions, [POSITIONS, KEY, torch.arange(1)]),
    "sums": (add_rows, [torch.zeros(512).double(), torch.zeros(512).double(), torch.zeros(16, 512).half()]),
    "update": (update, [*(torch.ones(64, 48) for _ in range(5)), torch.ones(1, 4), torch.zeros(())]),
}


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_a_program_translates_for_a_gpu(program, tmp_path):
    function, inputs = PROGRAMS[program]
    assert translated_kernels(function, inputs, tmp_path)


def test_an_index_that_is_multiplied_by_a_large_constant_does_not(tmp_path):
    def program(positions, count):
        return positions[:, None] + torch.arange(count) * 0xD2511F53

    with pytest.raises(Exception, match="out of range for type int32"):
        translated_kernels(partial(program, count=1024), [POSITIONS], tmp_path)
