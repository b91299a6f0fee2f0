"""Muon is one optimizer for every parameter, skips on the device, and learns the same however weights are held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train.engine.muon import Muon, orthogonalize, polynomials
from train.engine.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from train.models.build import build_model
from train.settings.config import OptimizerSettings
from train.settings.presets import dit_settings

ROOT = Path(__file__).parents[2]
STEPS = polynomials(1.05, safety_on_last=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3))


def learn(model, optimizer, steps=range(3), bad=()):
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        (loss * float("inf") if step in bad else loss).backward()
        optimizer.found_inf = torch.tensor(float(step in bad))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 5, 40), (2, 40, 5), (1, 1, 9)])
def test_singular_values_come_close_to_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices, STEPS, torch.float32) @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.2
    assert torch.allclose(found, torch.diag_embed(values), atol=1e-4)


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(2, 4, 6), STEPS, torch.float32).any()


def test_a_step_that_is_not_finite_changes_neither_weights_nor_state():
    model = network()
    optimizer = Muon(list(model.parameters()), lr=0.1, weight_decay=0.1)
    learn(model, optimizer, range(2))
    before = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    weights = [p.detach().clone() for p in model.parameters()]
    after = learn(model, optimizer, [2], bad=[2])
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    state = optimizer_tensors(model, optimizer)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_restored_optimizer_goes_on_as_the_one_that_was_saved():
    model = network()
    optimizer = Muon(list(model.parameters()), lr=0.1)
    learn(model, optimizer, range(2))
    saved = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    other = network()
    other.load_state_dict(model.state_dict())
    again = Muon(list(other.parameters()), lr=0.1)
    restore_optimizer(other, again, saved)
    expected, found = learn(model, optimizer, [2]), learn(other, again, [2])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_matrices_have_momentum_and_everything_else_has_adamws_moments():
    model = network()
    optimizer = make_optimizer(model, OptimizerSettings(kind="muon"))
    learn(model, optimizer, [0])
    kinds = {}
    for name in optimizer_tensors(model, optimizer):
        kind, parameter = name.split("/")
        kinds.setdefault(parameter, set()).add(kind)
    for name, parameter in model.named_parameters():
        assert kinds[name] == ({"momentum"} if parameter.ndim == 2 else {"step", "exp_avg", "exp_avg_sq"})


def test_every_group_follows_the_learning_rate_it_is_set_to():
    model = network()
    optimizer = make_optimizer(model, OptimizerSettings(kind="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, learn(model, optimizer), strict=True))


def run(mode, processes, out):
    script = str(ROOT / "tests/train/muon_run.py")
    command = [sys.executable, script, mode, str(out)]
    if processes > 1:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node"]
        command = [*torchrun, str(processes), script, mode, str(out)]
    subprocess.run(
        command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    )
    return torch.load(out)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(mode, tmp_path):
    alone, together = run("plain", 1, tmp_path / "one.pt"), run(mode, 2, tmp_path / "two.pt")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert torch.allclose(value, together[name], rtol=1e-4, atol=1e-6), name
        assert value.isfinite().all()


@pytest.mark.parametrize("preset", ["dit-tiny", "dit-dh-tiny", "raev2-tiny"])
def test_it_lowers_the_loss_of_every_kind_of_transformer(preset, one_store):
    from train.settings.networks import dit_config

    torch.manual_seed(0)
    model = build_model(dit_config(dit_settings(preset).model, one_store))
    optimizer = make_optimizer(model, OptimizerSettings(kind="muon", lr=0.02))
    config = model.config
    x = torch.randn(4, config.token_width, *config.grid)
    t, y = torch.rand(4), torch.zeros(4, dtype=torch.long)
    losses = []
    for _ in range(8):
        out = model(x, t, y)
        loss = sum((part - x).square().mean() for part in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture(scope="module")
def one_store(store_path):
    from shards import open_store

    return open_store(store_path)
