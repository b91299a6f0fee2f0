"""Averages of weights: what is evaluated through them, also compiled, and what stays untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.engine.ema import WeightAverages


def moved_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    averages = WeightAverages(model, (0.9, 0.5))
    start = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averages.update()
    return model, averages, start


def test_one_step_moves_by_one_minus_the_rate():
    _, averages, start = moved_model()
    for rate in (0.9, 0.5):
        for name, average in averages.weights(rate).items():
            torch.testing.assert_close(average, start[name] + (1 - rate))


def test_buffers_are_not_averaged():
    model, averages, _ = moved_model()
    assert set(averages.weights(0.9)) == set(dict(model.named_parameters()))


def test_within_applied_the_model_is_the_average_and_afterwards_itself():
    model, averages, _ = moved_model()
    own = {name: p.clone() for name, p in model.named_parameters()}
    kept = {name: a.clone() for name, a in averages.weights(0.5).items()}
    with averages.applied(0.5):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, kept[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name])
        assert torch.equal(averages.weights(0.5)[name], kept[name])


@pytest.mark.slow  # loads the compiler
def test_a_compiled_model_runs_the_average_too():
    # The reference's averaged copy runs the trained weights once it is compiled.
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model.compile(backend="eager")
    x = torch.ones(1, 4)
    averages = WeightAverages(model, (0.5,))
    before = model(x)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    assert not model(x).any()
    with averages.applied(0.5):
        assert torch.equal(model(x), before)
