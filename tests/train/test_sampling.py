"""Integration against closed forms, and guidance's edges."""

from __future__ import annotations

import math

import pytest
import torch

from shards.errors import UsageError
from train.flow.guidance import auto_guidance, classifier_free
from train.flow.integrators import ADAPTIVE_METHODS, METHODS, integrate, time_grid
from train.flow.mean_flow import jump
from train.flow.path import MAX_TIME, draw_time, shift_time


def growth(x, _t):
    return x


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_close_to_the_exponential(method):
    grid = time_grid(41, 1.0, "to-zero")
    found = integrate(growth, torch.ones(2, 3, dtype=torch.float64), grid, method)
    assert found.shape == (2, 3)
    assert torch.allclose(
        found, torch.full_like(found, math.exp(-1)), atol=2e-2 if method == "euler" else 2e-3
    )


def test_halving_the_step_halves_eulers_error_and_quarters_heuns():
    def error(method, points):
        found = integrate(
            growth, torch.ones(1, 1, dtype=torch.float64), time_grid(points, 1.0, "to-zero"), method
        )
        return abs(found.item() - math.exp(-1))

    assert error("euler", 41) / error("euler", 81) == pytest.approx(2, rel=0.05)
    assert error("heun", 41) / error("heun", 81) == pytest.approx(4, rel=0.05)


def test_a_straight_line_is_followed_exactly_in_one_step():
    data, noise = torch.randn(2, 4, 8).double()
    found = integrate(lambda _x, _t: noise - data, noise, time_grid(2, 1.0, "to-zero"))
    assert torch.allclose(found, data)


def test_grids_begin_at_noise_and_end_where_their_name_says():
    published, to_zero = time_grid(50, 6.928203230275509), time_grid(51, 6.928203230275509, "to-zero")
    assert published[0] == to_zero[0] == 1
    assert published[-1].item() == pytest.approx(0.006887285, rel=1e-5)
    assert to_zero[-1] == 0
    assert (published.diff() < 0).all()


def test_steps_are_reported_with_their_times():
    for method in ("heun", ADAPTIVE_METHODS[0]):
        seen = []
        grid = time_grid(5, 1.0)
        integrate(
            growth,
            torch.ones(1, 1),
            grid,
            method,
            on_step=lambda n, t, _x, seen=seen: seen.append((n, t.item())),
        )
        assert seen[-1] == (4, grid[-1].item())
        assert len(seen) == (4 if method == "heun" else 1)


def test_unknown_methods_and_grids_of_one_point_are_refused():
    with pytest.raises(UsageError, match="got 'leapfrog'"):
        integrate(growth, torch.ones(1, 1), time_grid(2, 1.0), "leapfrog")
    with pytest.raises(UsageError, match="at least 2 points"):
        time_grid(1, 1.0)


def test_guidance_costs_nothing_at_scale_one_or_outside_its_interval():
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x * y.view(-1, 1)

    x, t, y = torch.ones(2, 1), torch.tensor([0.5, 0.5]), torch.tensor([1, 2])
    classifier_free(model, y, 1.0, null_label=3)(x, t)
    classifier_free(model, y, 2.0, null_label=3, interval=(0.0, 0.4)).at(0.5)(x, t)
    auto_guidance(model, model, y, 2.0, interval=(0.6, 1.0)).at(0.5)(x, t)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("time", [0.2, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("halves", ["joined", "separate"])
def test_a_time_that_all_share_gives_what_times_of_their_own_give(time, halves):
    def model(x, t, y):
        return x.cos() * y.view(-1, 1) + t.view(-1, 1)

    x, y, t = torch.randn(3, 4), torch.tensor([1, 2, 0]), torch.full((3,), time)
    for interval in ((0.25, 0.9), (0.3, 1.0)):
        for guided in (
            classifier_free(model, y, 1.7, null_label=3, interval=interval, halves=halves),
            auto_guidance(model, lambda x, t, y: model(x, t, y) / 2, y, 1.7, interval=interval),
        ):
            assert torch.equal(guided.at(t[0].item())(x, t), guided(x, t))


def test_halves_are_one_call_of_twice_the_batch_or_two_of_the_batch():
    calls = []

    def model(x, t, y):
        calls.append((len(x), y.tolist()))
        return x

    x, t, y = torch.ones(2, 1), torch.tensor([0.5, 0.5]), torch.tensor([1, 2])
    classifier_free(model, y, 2.0, null_label=3, halves="joined")(x, t)
    classifier_free(model, y, 2.0, null_label=3, halves="separate")(x, t)
    assert calls == [(4, [1, 2, 3, 3]), (2, [1, 2]), (2, [3, 3])]


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guided_steps_ask_no_device_for_a_value(method):
    # Tensors on the meta device have none: asking for one raises.
    x, y = torch.empty(2, 3, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    guided = classifier_free(lambda x, t, y: x * t.view(-1, 1), y, 2.0, null_label=3, interval=(0.2, 0.7))
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    assert integrate(guided, x, time_grid(5, 3.0), method).shape == (2, 3)
    assert jump(lambda x, t, y, r: x * (t - r).view(-1, 1), x, y, time_grid(5, 3.0)).shape == (2, 3)


def test_guidance_is_decided_for_each_sample_with_both_ends_inside():
    def model(x, _t, y):
        return x * y.view(-1, 1)

    x, y = torch.ones(4, 1), torch.full((4,), 2)
    found = classifier_free(model, y, 3.0, null_label=1, interval=(0.25, 0.75))(
        x, torch.tensor([0.2, 0.25, 0.75, 0.8])
    )
    assert found.flatten().tolist() == [2, 4, 4, 2]


@pytest.mark.parametrize("arguments", [{"scale": 0.5}, {"scale": 2.0, "interval": (0.5, 0.5)}])
def test_meaningless_guidance_is_refused(arguments):
    with pytest.raises(UsageError, match="guidance"):
        classifier_free(lambda x, *_: x, torch.zeros(1).long(), null_label=1, **arguments)


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_drawn_times_rise_with_the_draw_and_stay_below_the_latest(distribution):
    u = torch.linspace(0, 1 - 2**-24, 1001)
    t = draw_time(u, distribution, mu=0.3, sigma=1.7, shift=6.9)
    assert (t.diff() >= 0).all()
    assert t.min() >= 0
    assert t.max() <= shift_time(torch.tensor(MAX_TIME), 6.9) + 1e-6
