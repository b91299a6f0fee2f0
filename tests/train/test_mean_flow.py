"""Mean flows of normal data, which have a closed form, and the draws of their training. No network but the last."""

from __future__ import annotations

import pytest
import torch

from shards.errors import UsageError
from train.flow.integrators import integrate, time_grid
from train.flow.mean_flow import (
    adaptive_loss,
    average_between,
    average_velocity_target,
    difference_quotient,
    draw_times,
    jump,
    most_jumps,
    random_jumps,
    rows_first,
    spread_jumps,
    state_times,
    trajectory,
    trajectory_pairs,
)
from train.models.build import build_model
from train.models.config import DiTConfig, DiTDHConfig, InContextDiTConfig, config_from_dict, config_to_dict
from train.models.cost import num_parameters

SIGMA = 0.6
"""Standard deviation of the data."""


def variance(t):
    return (1 - t) ** 2 * SIGMA**2 + t**2


def velocity(x, t):
    t = t[:, None]
    return x * (t - (1 - t) * SIGMA**2) / variance(t)


def average_velocity(x, t, _y, r):
    # Along a trajectory the state keeps its quantile: x_r = x_t · √(V(r) / V(t)).
    t, r = t[:, None], r[:, None]
    end = x * (variance(r) / variance(t)).sqrt()
    return torch.where(t == r, velocity(x, t[:, 0]), (x - end) / torch.where(t == r, 1, t - r))


@pytest.fixture
def spans():
    """States and spans of time: x_t float64 [500, 1], t and r, some without extent."""
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    t, r = times.amax(dim=1), times.amin(dim=1)
    r[::5] = t[::5]
    x = torch.randn(500, 1, generator=generator, dtype=torch.float64) * variance(t)[:, None].sqrt()
    return x, t, r


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def target_of(x, t, r, delta):
    v, y = velocity(x, t), torch.zeros(len(x), dtype=torch.int64)
    return average_velocity_target(v, t, r, difference_quotient(average_velocity, x, t, r, v, (y, y), delta))


def test_the_target_of_the_identity_is_the_average_velocity_itself(spans):
    x, t, r = spans
    expected = average_velocity(x, t, None, r)
    assert relative(target_of(*spans, delta=1e-5), expected) < 1e-8
    # The truncation of the published δ is what is left; a wrong sign, clock or divisor gives more than 0.1.
    assert relative(target_of(*spans, delta=5e-3), expected) < 1e-4


def test_jumps_with_the_average_velocity_are_exact_for_any_number_of_steps():
    noise = torch.randn(100, 1, dtype=torch.float64)
    for steps, kind in ((1, "to-zero"), (2, "to-zero"), (4, "to-zero"), (7, "published")):
        grid = time_grid(steps + 1, 3.0, kind).double()
        found = jump(average_velocity, noise, torch.zeros(100), grid)
        expected = noise * (variance(grid[-1]) / variance(grid[0])).sqrt()
        assert relative(found, expected) < 1e-12
    with pytest.raises(UsageError, match="later to earlier"):
        jump(average_velocity, noise, torch.zeros(100), torch.tensor([0.0, 1.0]))


def test_lines_between_states_of_a_fine_trajectory_are_average_velocities():
    grid = time_grid(2001, 1.0, "to-zero").double()
    noise = torch.randn(50, 1, dtype=torch.float64)
    states = trajectory(velocity, noise, grid, "heun")
    pairs = trajectory_pairs(5) * 500  # every 500th state
    rows = torch.arange(len(pairs)) % 50
    start, t, r, target = average_between(states, state_times(grid, "true"), pairs, rows)
    assert (t > r).all()
    assert relative(target, average_velocity(start, t.double(), None, r.double())) < 1e-5
    assert torch.equal(states[-1], integrate(velocity, noise, grid, "heun"))


def test_published_labels_spread_the_states_evenly_whatever_the_grid():
    grid = time_grid(16, 48**0.5)
    true, published = state_times(grid, "true"), state_times(grid, "published")
    assert torch.equal(true, grid.double().flip(0))
    assert torch.allclose(published, torch.arange(16, dtype=torch.float64) / 15)
    assert (true - published).abs().max() == pytest.approx(0.45, abs=0.001)


def test_pairs_are_all_of_them_once_the_later_state_first():
    pairs = trajectory_pairs(4).tolist()
    assert pairs == [[1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]


def test_the_adaptive_loss_has_the_gradient_of_the_logarithm():
    prediction = torch.randn(3, 4, 2, requires_grad=True)
    target = torch.randn(3, 4, 2)
    loss, squared_error = adaptive_loss(prediction, target)
    assert torch.allclose(loss, torch.ones(3), atol=1e-3)
    loss.sum().backward()
    error = (prediction - target).detach()
    expected = 4 * error / (squared_error + 1e-3 / squared_error)[:, None, None]
    assert torch.allclose(prediction.grad, expected, rtol=1e-5)
    assert torch.allclose(squared_error, error.square().flatten(1).sum(1))
    plain, _ = adaptive_loss(prediction, target, power=0.0)
    assert torch.allclose(plain, squared_error**2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 1.0])
@pytest.mark.parametrize("first", [0, 7, (1 << 40) + 3])
def test_spread_jumps_are_as_many_in_any_window(share, first):
    jumps = spread_jumps(torch.arange(first, first + 4096), share)
    assert jumps.double().mean() == pytest.approx(share, abs=1e-3)
    for size in (1, 3, 8, 100):
        counts = jumps.long().unfold(0, size, 1).sum(1)
        assert counts.max() <= most_jumps(size, share)
        assert counts.max() - counts.min() <= 1


def test_random_jumps_have_their_share_and_r_is_t_elsewhere():
    u = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(1))
    jumps = random_jumps(torch.rand(100_000, generator=torch.Generator().manual_seed(2)), 0.25)
    t, r = draw_times(u, jumps, shift=48**0.5)
    assert jumps.double().mean() == pytest.approx(0.25, abs=0.005)
    assert torch.equal(r < t, jumps & (r != t))
    assert torch.equal(r[~jumps], t[~jumps])
    # The later of two shifted draws; the figures of 400,000 draws of the reference.
    assert t.mean() == pytest.approx(0.9028, abs=0.002)
    assert (t - r)[jumps].mean() == pytest.approx(0.2317, abs=0.005)


def test_rows_of_jumps_come_first_and_others_fill_up():
    jumps = torch.tensor([False, True, False, False, True, False])
    assert rows_first(jumps, 3).tolist() == [1, 4, 0]


SHAPE = {"token_width": 6, "grid": (4, 4), "num_classes": 3, "width": 16, "depth": 1, "num_heads": 2}
CONFIGS = [
    pytest.param(DiTConfig(**SHAPE), id="dit"),
    pytest.param(DiTDHConfig(**SHAPE, head_width=24, head_depth=1, head_num_heads=2), id="dit-dh"),
    pytest.param(InContextDiTConfig(**SHAPE, base_depth=1), id="raev2-plain"),
    pytest.param(
        InContextDiTConfig(**SHAPE, head_width=24, head_depth=1, head_num_heads=2, base_depth=1), id="raev2"
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_network_without_end_time_is_what_it_was_and_refuses_one(config):
    assert "end_time" not in config_to_dict(config)
    model = build_model(config)
    assert not any("r_embedder" in key for key in model.state_dict())
    with pytest.raises(UsageError, match="end_time"):
        model(torch.zeros(1, 6, 4, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64), r=torch.zeros(1))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_network_with_end_time_learns_from_it(config):
    config = type(config)(**{**config_to_dict(config), "end_time": True})
    assert config_from_dict(config_to_dict(config)) == config
    torch.manual_seed(0)
    model = build_model(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    for parameter in model.parameters():  # the zero-initialised layers let nothing through
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(4, 6, 4, 4), torch.tensor([1.0, 0.9, 0.5, 0.2]), torch.tensor([0, 1, 2, 3])

    def outputs(**end):
        out = model(x, t, y, **end)
        return torch.stack(out) if isinstance(out, tuple) else out[None]

    for to_zero, instantaneous in zip(outputs(r=torch.zeros(4)), outputs(), strict=True):
        assert not torch.allclose(to_zero, instantaneous)
    assert torch.equal(outputs(), outputs(r=t))
    outputs(r=t / 2).square().mean().backward()
    trained = [p for name, p in model.named_parameters() if name.startswith("r_embedder.mlp")]
    assert len(trained) == 4
    assert all(p.grad.abs().sum() > 0 for p in trained)
