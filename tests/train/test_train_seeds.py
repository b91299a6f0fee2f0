"""Several seeds in one command: a run each, as a command of its own makes it, continued by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.engine.checkpoint import checkpoints
from train.engine.loop import Trainer
from train.settings.saved_settings import load_settings

ROOT = Path(__file__).parents[2]
SEEDS = "--seed 3 5 4 --max-steps"


def test_each_seed_s_run_is_the_one_that_a_command_of_its_own_makes(
    tmp_path, train_here, checkpoint_tensors, losses, caplog
):
    with caplog.at_level("INFO"):
        assert train_here("dit", tmp_path / "x", f"{SEEDS} 2") == 0
    assert f"run 2 of 3: {tmp_path / 'x' / 'seed-5'}" in caplog.text
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["seed-3", "seed-4", "seed-5"]
    assert train_here("dit", tmp_path / "alone", "--seed 5 --max-steps 3") == 0
    # the same command continues each of them
    assert train_here("dit", tmp_path / "x", f"{SEEDS} 3") == 0
    found = tmp_path / "x" / "seed-5"
    assert losses(found) == losses(tmp_path / "alone")
    one, other = checkpoint_tensors(found), checkpoint_tensors(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings = load_settings(found / "config.json")
    assert settings.varies == str(tmp_path / "x" / "seed-3" / "config.json")
    assert settings.varies_in == ("seed: 3 → 5",)


def test_a_run_keeps_the_note_of_what_it_varies_however_it_is_continued(tmp_path, train_here):
    from train.dit import main

    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here("dit", first, "--max-steps 1") == 0
    varied = f"{first}/config.json --optimizer.lr 0.001 --out {second}".split()
    assert main(varied) == 0
    note = load_settings(second / "config.json")
    assert (note.varies, note.varies_in) == (f"{first}/config.json", ("optimizer.lr: 0.002 → 0.001",))
    assert main([f"{second}/config.json", "--max-steps", "2"]) == 0
    now = load_settings(second / "config.json")
    assert (now.varies, now.varies_in, now.max_steps) == (note.varies, note.varies_in, 2)


def test_a_stop_ends_the_list_and_the_same_command_goes_on_with_it(tmp_path, train_here, monkeypatch):
    step = Trainer.train_step

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        assert train_here("dit", tmp_path / "x", f"{SEEDS} 3") == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["seed-3"]
    assert train_here("dit", tmp_path / "x", f"{SEEDS} 3") == 0
    for seed in (3, 4, 5):
        newest = checkpoints(tmp_path / "x" / f"seed-{seed}" / "checkpoints")[-1]
        assert newest.name == "step-00000003"


@pytest.mark.slow
def test_several_processes_train_the_seeds_that_one_would(tmp_path, arguments, train_here, losses):
    assert train_here("dit", tmp_path / "one", f"{SEEDS} 2") == 0
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "train/dit.py", *arguments("dit", tmp_path / "two", f"{SEEDS} 2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for seed in (3, 4, 5):
        one, two = (losses(tmp_path / name / f"seed-{seed}") for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)
