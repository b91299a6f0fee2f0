"""A loss or gradient that is not finite changes nothing, is reported, and too many of them stop the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shards.errors import UserError
from train.distributed import Team
from train.engine.feed import MicroBatch
from train.engine.loop import Trainer
from train.engine.signals import StopRequest
from train.engine.task import Losses, Task
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings


class Spiky(Task):
    """One weight; samples in rows of `broken` have a loss of infinity."""

    config = None

    def __init__(self, broken=()):
        self.model = nn.Linear(1, 1, bias=False)
        self.broken = torch.tensor(broken)

    def losses(self, model, batch):
        losses = model(torch.ones(len(batch), 1)).squeeze(1) ** 2
        scale = torch.where(torch.isin(torch.from_numpy(batch.rows), self.broken), torch.inf, 1.0)
        return Losses(losses * scale, {})

    def describe(self, positions):
        return f"positions {positions.tolist()}"

    def save_snapshot(self, path, weights, *, step, ema_rate):
        raise AssertionError

    render_samples = save_snapshot


class Log(list):
    """A journal that keeps what is log."""

    log = list.append


def batch(*rows):
    rows = np.array(rows)
    return MicroBatch(
        step=0,
        rows=rows,
        positions=torch.from_numpy(rows + 100),
        labels=torch.zeros(len(rows)),
        fields={},
        last_of_step=True,
    )


def trainer_of(task, tmp_path, **changes):
    settings = DiTSettings(
        model=DiTNetwork(width=4, depth=1, num_heads=1),
        out=tmp_path,
        global_batch_size=2,
        ema_rates=(0.5,),
        precision="fp32",
        optimizer=OptimizerSettings(lr=0.1),
        **changes,
    )
    return Trainer(task, settings, Team(), steps_per_epoch=1, facts={})


def test_a_bad_step_changes_neither_weights_nor_moments_and_names_its_samples(tmp_path):
    trainer = trainer_of(Spiky(broken=(7,)), tmp_path)
    log = Log()
    assert not trainer.record(trainer.train_step(iter([batch(1, 2)]), StopRequest()), log)
    weight = trainer.task.model.weight.clone()
    state = trainer.optimizer.state[trainer.task.model.weight]
    moments = {name: value.clone() for name, value in state.items()}
    trainer.record(trainer.train_step(iter([batch(3, 7)]), StopRequest()), log)
    assert torch.equal(trainer.task.model.weight, weight)
    assert all(torch.equal(state[name], value) for name, value in moments.items())
    assert trainer.bad_steps == 1
    assert "rows [7]" in log[0]
    assert "positions [107]" in log[0]
    trainer.record(trainer.train_step(iter([batch(1, 2)]), StopRequest()), log)
    assert not torch.equal(trainer.task.model.weight, weight)
    # The mean of the window is over the sound steps alone.
    assert np.isfinite(trainer.window.means()["loss"])


def test_too_many_bad_steps_stop_the_run(tmp_path):
    trainer = trainer_of(Spiky(broken=(7,)), tmp_path, max_bad_steps=2)
    for _ in range(2):
        trainer.record(trainer.train_step(iter([batch(7, 1)]), StopRequest()), Log())
    with pytest.raises(UserError, match="--max-bad-steps 2"):
        trainer.record(trainer.train_step(iter([batch(7, 1)]), StopRequest()), Log())


def test_a_real_run_stops_when_it_diverges(tmp_path, train_here):
    with pytest.raises(UserError, match="not finite"):
        train_here("dit", tmp_path, "--max-steps 200 --optimizer.lr 1e30 --max-bad-steps 3")
