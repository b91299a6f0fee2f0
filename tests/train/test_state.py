"""A run's tensors go into a checkpoint and back, one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import nn

from train.engine.checkpoint import open_part, save_checkpoint
from train.engine.ema import WeightAverages
from train.engine.optimizer import make_optimizer
from train.engine.state import restore_parts, state_parts
from train.settings.config import OptimizerSettings


class Watched(Mapping):
    """Reads from a part, and requires that what was read before is gone by then."""

    held = staticmethod(lambda: None)

    def __init__(self, part):
        self.part = part

    def __getitem__(self, name):
        assert Watched.held() is None, f"an earlier tensor is still held when {name} is read"
        tensor = self.part[name]
        Watched.held = weakref.ref(tensor)
        return tensor

    def __contains__(self, name):
        return name in self.part

    def __iter__(self):
        return iter(self.part)

    def __len__(self):
        return len(self.part)


def built(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, WeightAverages(model, (0.9, 0.5)), make_optimizer(model, OptimizerSettings())


def test_restoring_holds_one_tensor_of_the_checkpoint_at_a_time_and_gives_every_one_back(tmp_path):
    model, averages, optimizer = built(0)
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        averages.update()
    saved = state_parts(model, averages, optimizer)
    path = save_checkpoint(tmp_path, 2, saved, {})

    @contextmanager
    def opened(part):
        with open_part(path, part) as stored:
            yield Watched(stored)

    other = built(1)
    restore_parts(opened, *other)
    assert Watched.held() is None
    found = state_parts(*other)
    assert {name: part.keys() for name, part in found.items()} == {
        name: part.keys() for name, part in saved.items()
    }
    for name, part in saved.items():
        for key, tensor in part.items():
            assert torch.equal(found[name][key], tensor), (name, key)
