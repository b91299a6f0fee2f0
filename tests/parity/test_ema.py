"""The running average of weights is the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.engine.ema import WeightAverages


def as_module(weights):
    module = nn.Module()
    for name, value in weights.items():
        module.register_parameter(name, nn.Parameter(value.clone()))
    return module


@pytest.mark.recorded("ema*")
def test_the_average_follows_the_recorded_one_step_by_step(case, assert_matches):
    model = as_module(case.state_dict("ema_start."))
    averages = WeightAverages(model, (case.meta["decay"], 0.5))
    for step in range(case.meta["steps"]):
        with torch.no_grad():
            for name, value in case.state_dict(f"model_{step}.").items():
                model.get_parameter(name).copy_(value)
        averages.update()
        for name, value in case.state_dict(f"ema_{step}.").items():
            assert_matches(
                averages.weights(case.meta["decay"])[name], value, case.tolerance, f"{name} {step}"
            )
