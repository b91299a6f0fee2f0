"""Grids and trajectories are the reference sampler's."""

from __future__ import annotations

import pytest
import torch
from reference_configs import config_from_reference

from train.flow.guidance import ALWAYS, auto_guidance, classifier_free, unguided
from train.flow.integrators import integrate, time_grid
from train.models.build import build_model


@pytest.mark.recorded("ode_time_grids*")
def test_grids_and_the_times_of_evaluation_equal_the_recorded_ones(case, assert_matches):
    for name, values in case.meta["cases"].items():
        grid = time_grid(values["num_steps"], values["shift"])
        assert_matches(grid, case.tensors[f"grid.{name}"], what=name)
        times = []
        integrate(lambda x, t, times=times: times.append(t[0]) or x, torch.zeros(1, 1), grid)
        assert len(times) == values["model_calls"]
        assert_matches(torch.stack(times), case.tensors[f"evaluated.{name}"], what=f"{name} evaluations")


@pytest.mark.recorded("ode_linear_field*")
def test_every_method_solves_the_linear_field_as_recorded(case, assert_matches):
    matrix, offset, noise = (case.tensors[name] for name in "Abz")

    def velocity(x, t):
        return x @ matrix.T + t[:, None] * offset

    grid = time_grid(case.meta["num_steps"], case.meta["shift"])
    assert_matches(grid, case.tensors["t"], what="grid")
    states = [noise]
    integrate(velocity, noise, grid, on_step=lambda _step, _t, x: states.append(x))
    assert_matches(torch.stack(states), case.tensors["euler.trajectory"], what="trajectory")
    for key in (key for key in case.tensors if key.endswith(".final") and not key.startswith("shift1")):
        method = key.removesuffix(".final")
        assert_matches(integrate(velocity, noise, grid, method), case.tensors[key], what=key)
    unshifted = time_grid(case.meta["num_steps"], 1.0)
    assert_matches(unshifted, case.tensors["shift1.t"], what="unshifted grid")
    assert_matches(
        integrate(velocity, noise, unshifted), case.tensors["shift1.euler.final"], what="unshifted"
    )


@pytest.mark.recorded("ode_dit_dh*")
def test_guided_samples_of_a_dit_dh_equal_the_recorded_ones(case, assert_matches):
    def load(prefix, config):
        model = build_model(config_from_reference(case.meta[config]))
        model.load_state_dict(case.state_dict(prefix), strict=True)
        return model.eval()

    model, guide = load("sd.", "config"), load("sd_guid.", "guidance_model_config")
    noise, y = case.tensors["z"], case.tensors["y"]
    null_label = case.meta["config"]["num_classes"]
    grid = time_grid(case.meta["num_steps"], case.meta["shift"])

    states = [noise]
    integrate(unguided(model, y), noise, grid, on_step=lambda _step, _t, x: states.append(x))
    assert_matches(torch.stack(states), case.tensors["plain.trajectory"], what="plain")
    for name, interval in (("interval_0_1", ALWAYS), ("interval", tuple(case.meta["interval"]))):
        fields = {
            "cfg": classifier_free(
                model, y, case.meta["cfg_scale"], null_label=null_label, interval=interval
            ),
            "autoguidance": auto_guidance(model, guide, y, case.meta["ag_scale"], interval=interval),
        }
        for kind, field in fields.items():
            final = f"{kind}.{name}.final"
            assert_matches(integrate(field, noise, grid), case.tensors[final], what=final)
    unshifted = integrate(unguided(model, y), noise, time_grid(case.meta["num_steps"], 1.0))
    assert_matches(unshifted, case.tensors["plain_shift1.final"], what="unshifted")
