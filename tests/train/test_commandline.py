"""The command line: presets, overrides, help without torch, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import UsageError, UserError
from train.settings import commandline
from train.settings.presets import DECODER_DEFAULT, DIT_DEFAULT, decoder_settings, dit_settings
from train.settings.saved_settings import to_json

ROOT = Path(__file__).parents[2]


def parse(*arguments):
    return commandline.parse(
        arguments, preset=dit_settings, default=DIT_DEFAULT, script="train/dit.py", presets=""
    )


def test_a_preset_with_overrides():
    settings = parse("dit-dh-s-256", "--optimizer.lr", "1e-4", "--max-steps", "7", "--views", "center")
    assert (settings.optimizer.lr, settings.max_steps, settings.views) == (1e-4, 7, ("center",))
    assert settings.model == dit_settings("dit-dh-s-256").model
    assert settings.out == Path("runs/dit-dh-s-256")


def test_the_default_preset_is_the_published_network():
    assert parse("--seed", "4").model == dit_settings("dit-dh-xl-256").model


def test_none_and_auto_can_be_said():
    settings = parse("--model.grid", "None", "--model.head-width", "auto", "--optimizer.clip-norm", "None")
    assert (settings.model.grid, settings.model.head_width, settings.optimizer.clip_norm) == (
        None,
        "auto",
        None,
    )


def test_a_switch_is_given_by_value():
    assert parse("--activation-checkpointing", "True").activation_checkpointing


def test_unknown_presets_and_files_are_users_errors(tmp_path):
    with pytest.raises(UsageError, match="no preset"):
        parse("dit-dh-giant")
    with pytest.raises(UserError, match="no settings file"):
        parse(str(tmp_path / "config.json"))


def parse_runs(*arguments):
    return commandline.parse_runs(
        arguments, preset=dit_settings, default=DIT_DEFAULT, script="train/dit.py", presets=""
    )


def test_several_seeds_are_a_run_each_that_varies_the_first():
    runs = parse_runs("dit-dh-s-256", "--seed", "3", "-1", "7", "--out", "runs/x", "--max-steps", "7")
    assert [run.seed for run in runs] == [3, -1, 7]
    assert [str(run.out) for run in runs] == ["runs/x/seed-3", "runs/x/seed--1", "runs/x/seed-7"]
    assert [run.max_steps for run in runs] == [7, 7, 7]
    assert [run.varies for run in runs] == [None, *["runs/x/seed-3/config.json"] * 2]
    assert [run.varies_in for run in runs] == [(), ("seed: 3 → -1",), ("seed: 3 → 7",)]
    alone = parse_runs("dit-dh-s-256", "--seed", "3", "--out", "runs/x")
    assert [str(run.out) for run in alone] == ["runs/x"]


def test_seeds_of_another_run_vary_that_run(tmp_path):
    config = tmp_path / "dit" / "config.json"
    config.parent.mkdir()
    config.write_text(to_json(replace(dit_settings("dit-dh-s-256"), allow_change=("store",))))
    runs = parse_runs(str(config), "--seed", "0", "1", "--optimizer.lr", "1e-4", "--out", str(tmp_path / "x"))
    assert [run.varies for run in runs] == [str(config)] * 2
    assert [run.varies_in for run in runs] == [
        ("optimizer.lr: 0.0002 → 0.0001",),
        ("optimizer.lr: 0.0002 → 0.0001", "seed: 0 → 1"),
    ]
    assert runs[0].allow_change == ()
    with pytest.raises(UsageError, match="give --out"):
        parse_runs(str(config), "--seed", "0", "1")


def test_a_seed_that_is_named_twice_is_refused():
    with pytest.raises(UsageError, match="--seed names a seed twice: 1 2 1"):
        parse_runs("--seed", "1", "2", "1")
    with pytest.raises(SystemExit):
        parse_runs("--seed", "1", "two")


def test_statistics_are_for_a_dit_alone(capsys):
    assert parse("--statistics", "stat.pt").statistics == Path("stat.pt")
    with pytest.raises(SystemExit):
        commandline.parse(
            ["--statistics", "stat.pt"],
            preset=decoder_settings,
            default=DECODER_DEFAULT,
            script="train/decoder.py",
            presets="",
        )
    assert "--statistics" in capsys.readouterr().err


def test_errors_become_one_line_and_an_exit_code(capsys):
    def fail(arguments):
        raise UsageError("this cannot be")

    with pytest.raises(SystemExit) as stopped:
        commandline.run(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: this cannot be\n"


def test_an_interrupt_says_how_to_continue(capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        commandline.run(interrupted)
    assert stopped.value.code == 130
    assert "same command" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train/dit.py", "train/decoder.py"])
def test_help_lists_presets_and_loads_nothing_heavy(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tiny" in done.stdout
    assert "--optimizer.lr" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "zarr", "pyarrow", "accelerate", "pydantic"}


def test_a_mistake_in_the_command_exits_with_2():
    done = subprocess.run(
        [sys.executable, "train/dit.py", "--nonsense", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2


def test_an_out_that_is_a_file_is_refused_before_the_store_is_opened(tmp_path, train_here):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UsageError, match="cannot be a folder"):
        train_here("dit", tmp_path / "run", store=tmp_path / "none")
    assert (tmp_path / "run").read_text() == "mine"
