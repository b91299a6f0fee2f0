"""A run of an earlier version, kept in tests/fixtures/runs, is read and continued by this one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.settings.saved_settings import load_settings
from train.weights.snapshot import load_snapshot

EARLIER = Path(__file__).parents[1] / "fixtures/runs/decoder"


def test_settings_of_an_earlier_version_are_read_with_defaults_for_what_was_added():
    settings = load_settings(EARLIER / "config.json")
    assert (settings.max_steps, settings.seed, settings.ema_rates) == (4, 3, (0.9, 0.5))
    assert settings.optimizer.kind == "adamw"


def test_a_snapshot_of_an_earlier_version_holds_the_average_bit_for_bit():
    snapshot = load_snapshot(EARLIER / "snapshots/latest.safetensors")
    averages = load_file(EARLIER / "checkpoints/step-00000004/ema-0.9.safetensors")
    assert snapshot.meta.step == 4
    assert snapshot.meta.class_names == ("ant", "bee", "cat")
    for name, parameter in snapshot.model.named_parameters():
        assert torch.equal(parameter, averages[name])


def test_an_earlier_run_continues_as_one_that_never_stopped(tmp_path, train_here, losses, checkpoint_tensors):
    shutil.copytree(EARLIER, tmp_path / "run")
    more = "--max-steps 8 --micro-batch-size 4"
    assert train_here("decoder", tmp_path / "run", more) == 0
    assert train_here("decoder", tmp_path / "whole", more) == 0
    # Another processor or version of torch than the earlier run's rounds otherwise.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    one, other = (checkpoint_tensors(tmp_path / name) for name in ("run", "whole"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-2, atol=1e-3)
