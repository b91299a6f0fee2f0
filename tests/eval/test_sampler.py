"""Latents by sample number, and what guidance costs."""

import itertools

import pytest
import torch
from torch import nn

from eval.generate.sampler import LatentSampler
from train.flow.integrators import time_grid
from train.flow.path import time_shift

SHAPE = (3, 2, 2)


class Recorder(nn.Module):
    """A model whose velocity is a multiple of the state and the label, and which remembers its batches."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.batches = []

    def forward(self, x, t, y):
        self.batches.append((len(x), y.tolist()))
        return self.factor * x + y.view(-1, 1, 1, 1)


def _sampler(model, **changes):
    settings = {"latent_shape": SHAPE, "num_classes": 5, "classes": (0, 1, 2, 3, 4), "points": 4, **changes}
    return LatentSampler(model=model, **settings)


def test_latents_follow_eulers_rule_over_the_shifted_grid():
    sampler = _sampler(Recorder(0.5))
    numbers = torch.tensor([7])
    start = _sampler(Recorder(0.0), points=2, classes=(0,)).latents(numbers)
    expected = start
    grid = time_grid(4, time_shift(12))
    for now, then in itertools.pairwise(grid):
        expected = expected + (then - now) * (0.5 * expected + 7 % 5)
    torch.testing.assert_close(sampler.latents(numbers), expected)


def test_a_sample_is_the_same_in_any_company():
    sampler = _sampler(Recorder(0.5), seed=3)
    together = sampler.latents(torch.arange(6))
    torch.testing.assert_close(together[4:5], sampler.latents(torch.tensor([4])))


def test_another_shift_base_moves_the_times():
    numbers = torch.tensor([1])
    plain, shifted = (_sampler(Recorder(0.5), shift_base=base).latents(numbers) for base in (4096, 3))
    assert not torch.allclose(plain, shifted)


def test_autoguidance_calls_each_model_once_a_step_with_the_labels_and_nothing_twice():
    model, guide = Recorder(0.5), Recorder(0.4)
    _sampler(model, guide=guide, guidance="autoguidance", scale=1.4).latents(torch.arange(3))
    assert model.batches == guide.batches == [(3, [0, 1, 2])] * 3


def test_classifier_free_guidance_asks_for_both_halves_in_one_call():
    model = Recorder(0.5)
    _sampler(model, guidance="cfg", scale=1.4).latents(torch.arange(3))
    assert model.batches == [(6, [0, 1, 2, 5, 5, 5])] * 3


def test_outside_its_interval_guidance_costs_nothing():
    model, guide = Recorder(0.5), Recorder(0.4)
    settings = {"guide": guide, "guidance": "autoguidance", "scale": 1.4, "interval": (0.999, 1.0)}
    _sampler(model, **settings).latents(torch.arange(3))
    assert len(model.batches) == 3
    assert len(guide.batches) == 1


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 3), ("heun", 6)])
def test_the_number_of_evaluations_is_the_models_calls(method, evaluations):
    model = Recorder(0.5)
    sampler = _sampler(model, method=method)
    sampler.latents(torch.arange(2))
    assert len(model.batches) == sampler.evaluations() == evaluations
