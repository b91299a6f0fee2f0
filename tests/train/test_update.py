"""The update in one pass: what separate passes compute, to rounding; and the same state in a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.engine.ema import WeightAverages
from train.engine.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from train.engine.update import OnePass, SeparatePasses, blocks_of
from train.models.build import build_model
from train.models.config import dit_dh_config
from train.settings.config import OptimizerSettings

RATES = (0.9, 0.5)


class Side:
    """A network with everything that an update changes."""

    def __init__(self, way, model, settings, **options):
        self.model = model
        self.optimizer = make_optimizer(model, settings)
        self.averages = WeightAverages(model, RATES)
        self.update = way(model, self.optimizer, self.averages, settings.clip_norm, **options)

    def step(self, gradients, lr=None, loss=0.0):
        for group in self.optimizer.param_groups:
            group["lr"] = lr or group["lr"]
        for parameter, gradient in gradients.items():
            self.model.get_parameter(parameter).grad = None if gradient is None else gradient.clone()
        norm, bad = self.update(torch.tensor(loss))
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), bad.item()

    def tensors(self):
        """Weights, averages and optimizer state by name."""
        return {
            **{name: value.detach().clone() for name, value in self.model.named_parameters()},
            **{f"{r}/{n}": a.clone() for r in RATES for n, a in self.averages.weights(r).items()},
            **{name: value.clone() for name, value in optimizer_tensors(self.model, self.optimizer).items()},
        }


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList(nn.Linear(5, 7) for _ in range(3)), nn.LayerNorm(7))
    model[1].bias.requires_grad_(False)
    return model


def gradients_of(model, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def both(settings, **options):
    return Side(SeparatePasses, network(), settings), Side(OnePass, network(), settings, **options)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=2e-7, msg=name)


@pytest.mark.parametrize(
    "changes", [{}, {"clip_norm": None}, {"weight_decay": 0.1, "decay_matrices_only": True}]
)
def test_one_pass_gives_the_weights_moments_and_averages_of_separate_passes(changes):
    separate, one = both(OptimizerSettings(lr=0.01, **changes), compiled=False)
    for step in range(6):
        # Every other step is clipped.
        gradients = gradients_of(separate.model, 1.0 if step % 2 else 0.01, step)
        lr = 0.01 / (step + 1)
        assert separate.step(gradients, lr) == one.step(gradients, lr)
        assert_same(one.tensors(), separate.tensors())


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_step_that_is_not_finite_moves_the_averages_alone(broken):
    separate, one = both(OptimizerSettings(lr=0.01), compiled=False)
    for side in (separate, one):
        side.step(gradients_of(side.model, 1.0, 0))
    before = one.tensors()
    gradients = gradients_of(one.model, 1.0, 1)
    if broken == "gradient":
        gradients["0.1.weight"][2, 3] = math.nan
    loss = math.inf if broken == "loss" else 0.0
    for side in (separate, one):
        assert side.step(gradients, loss=loss)[1] == 1
    after = one.tensors()
    assert_same(after, separate.tensors())
    for name, value in after.items():
        assert torch.equal(value, before[name]) or name.startswith(("0.9/", "0.5/")), name
    assert not torch.equal(after["0.5/0.0.weight"], before["0.5/0.0.weight"])
    # And it leaves nothing behind: the next one is a step again.
    for side in (separate, one):
        assert side.step(gradients_of(side.model, 1.0, 2))[1] == 0
    assert_same(one.tensors(), separate.tensors())


def test_a_parameter_without_a_gradient_stays_and_its_average_follows():
    separate, one = both(OptimizerSettings(lr=0.01, weight_decay=0.1), compiled=False)
    for step in range(3):
        gradients = gradients_of(one.model, 1.0, step)
        gradients["0.2.bias"] = gradients["0.2.bias"] if step == 0 else None
        for side in (separate, one):
            side.step(gradients)
    assert_same(one.tensors(), separate.tensors())


def test_a_run_changes_from_one_way_to_the_other_at_any_checkpoint():
    settings = OptimizerSettings(lr=0.01)
    separate, one = both(settings, compiled=False)
    for step in range(2):
        for side in (separate, one):
            side.step(gradients_of(side.model, 1.0, step))
    changed = Side(OnePass, network(), settings, compiled=False)
    changed.model.load_state_dict(separate.model.state_dict())
    for rate in RATES:
        for name, average in changed.averages.weights(rate).items():
            average.copy_(separate.averages.weights(rate)[name])
    restore_optimizer(changed.model, changed.optimizer, optimizer_tensors(separate.model, separate.optimizer))
    for side in (separate, one, changed):
        side.step(gradients_of(side.model, 1.0, 9))
    assert_same(one.tensors(), separate.tensors())
    assert_same(changed.tensors(), separate.tensors())


def test_every_trained_parameter_is_in_one_block_and_blocks_that_are_alike_look_alike():
    model = build_model(dit_dh_config("s", token_width=8, grid=(2, 2), num_classes=3))
    blocks = list(blocks_of(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for block in blocks for p in block} == {id(p) for p in trained}
    assert sum(map(len, blocks)) == len(trained)
    # Deep blocks, the head's and the rest: three programs, whatever the depth.
    assert len({tuple(p.shape for p in block) for block in blocks}) == 3


@pytest.mark.slow  # runs the compiler
def test_compiled_it_is_the_same_and_blocks_that_are_alike_share_a_program():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    separate, one = both(OptimizerSettings(lr=0.01, weight_decay=0.1))
    for step in range(4):
        gradients = gradients_of(one.model, 1.0 if step % 2 else 0.01, step)
        if step == 2:
            gradients["0.0.bias"][0] = math.inf
        lr = 0.01 / (step + 1)
        assert separate.step(gradients, lr) == one.step(gradients, lr)
        assert_same(one.tensors(), separate.tensors())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
