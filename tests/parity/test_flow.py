"""Times, paths, targets and losses are the reference's."""

from __future__ import annotations

import pytest

from train.flow.path import draw_time, interpolate, per_sample_loss, shift_time, time_shift, velocity_target


def parse(distribution):
    name, *numbers = distribution.split("_")
    return name, dict(zip(("mu", "sigma"), map(float, numbers), strict=False))


@pytest.mark.recorded("transport_train*")
def test_training_pairs_equal_the_recorded_ones(case, assert_matches):
    data, prediction = case.tensors["x1"], case.tensors["model_output"]
    for name, values in case.meta["cases"].items():
        # The .json writes "shift_1." where the tensors say "shift_1".
        prefix = name.rstrip(".")
        recorded = {
            key: case.tensors[f"{prefix}.{key}"] for key in ("x0", "u", "t_pre", "t", "x_t", "u_t", "loss")
        }
        distribution, parameters = parse(values["time_dist_type"])
        before = draw_time(recorded["u"], distribution, **parameters)
        t = draw_time(recorded["u"], distribution, shift=values["time_dist_shift"], **parameters)
        assert_matches(before, recorded["t_pre"], what=f"{name} t before the shift")
        assert_matches(t, recorded["t"], what=f"{name} t")
        assert_matches(interpolate(data, recorded["x0"], recorded["t"]), recorded["x_t"], what=f"{name} x_t")
        target = velocity_target(data, recorded["x0"])
        assert_matches(target, recorded["u_t"], what=f"{name} target")
        loss = per_sample_loss(prediction, target)
        assert_matches(loss, recorded["loss"], what=f"{name} loss")
        assert_matches(loss.mean(), values["train_loss"], what=f"{name} training loss")


@pytest.mark.recorded("transport_train*")
def test_the_map_from_uniform_draws_to_times_is_the_recorded_one(case, assert_matches):
    maps = [key for key in case.tensors if key.startswith("map.") and key.endswith(".t_pre")]
    for key in maps:
        distribution, parameters = parse(key.removeprefix("map.").removesuffix(".t_pre"))
        assert_matches(
            draw_time(case.tensors["map.u"], distribution, **parameters), case.tensors[key], what=key
        )


@pytest.mark.recorded("time_shift_table*")
def test_shifted_times_equal_the_recorded_ones(case, assert_matches):
    for name, shift in case.meta["shifts"].items():
        assert_matches(shift_time(case.tensors["t"], shift), case.tensors[f"shifted.{name}"], what=name)


def test_the_published_shifts_are_the_square_roots_of_48_and_192():
    assert time_shift(768 * 16 * 16) == pytest.approx(48**0.5, rel=1e-15)
    assert time_shift(768 * 32 * 32) == pytest.approx(192**0.5, rel=1e-15)
