"""`python -m train.verify` reads every file of a run and names those that are not as they were written."""

from __future__ import annotations

import random

import pytest

from shards import UsageError
from train.verify import main


@pytest.fixture
def run(tmp_path, train_here):
    """A run of two steps, with a checkpoint of each."""
    train_here("dit", tmp_path / "run", "--max-steps 2 --checkpoint-every 1")
    return tmp_path / "run"


def test_a_whole_run_is_ok_and_every_file_of_it_is_named(run, capsys):
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    named = {line.split()[1].removeprefix(f"{run}/") for line in lines}
    assert named == {
        "config.json",
        "metrics.jsonl",
        "normalizer.safetensors",
        "checkpoints/step-00000001",
        "checkpoints/step-00000002",
        "snapshots/latest.safetensors",
        "snapshots/latest-ema0.5.safetensors",
    }
    assert main([str(run / "snapshots/latest.safetensors")]) == 0


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not the folder of a run"):
        main([str(tmp_path)])
    with pytest.raises(UsageError, match="name a run"):
        main([])


def test_one_flipped_bit_in_any_tensor_file_and_a_cut_text_file_are_named(run, capsys):
    generator = random.Random(0)
    files = sorted(run.rglob("*.safetensors"))
    assert len(files) == 11
    for file in files:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        assert main([str(run)]) == 1, f"{file} was changed"
        (line,) = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("ok ")]
        assert line.startswith(f"DAMAGED     {file} ")
        file.write_bytes(whole)
    for name in ("config.json", "metrics.jsonl", "checkpoints/step-00000001/state.json"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[: len(whole) // 3] + b"\n")
        assert main([str(run)]) == 1, f"{name} was cut"
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
        assert name in line
        (run / name).write_bytes(whole)
    assert main([str(run)]) == 0
