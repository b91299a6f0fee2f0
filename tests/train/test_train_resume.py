"""A run that is stopped and continued is the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from shards import FolderLock, UsageError, UserError
from train.engine.checkpoint import checkpoints
from train.report.metrics_file import read_metrics

EXACT = "--checkpoint-every 100 --snapshot-every 100"


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# 22 images in batches of 8: the first epoch ends inside step 2, the second inside step 5.
@pytest.mark.parametrize("trainer", ["dit", "raev2", "decoder"])
def test_n_and_n_steps_equal_2n_bit_for_bit_across_epochs(
    trainer, tmp_path, train_here, checkpoint_tensors, losses
):
    assert train_here(trainer, tmp_path / "whole", f"--max-steps 6 {EXACT}") == 0
    assert train_here(trainer, tmp_path / "halves", f"--max-steps 3 {EXACT}") == 0
    assert train_here(trainer, tmp_path / "halves", f"--max-steps 6 {EXACT}") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert sorted(losses(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6]
    whole = checkpoint_tensors(tmp_path / "whole")
    assert {name.split("/")[0] for name in whole} == {"model", "optimizer", "ema-0.9", "ema-0.5"}
    assert_same(whole, checkpoint_tensors(tmp_path / "halves"))
    for name in ("latest", "latest-ema0.5"):
        one, other = (
            (tmp_path / run / f"snapshots/{name}.safetensors").read_bytes() for run in ("whole", "halves")
        )
        assert one == other


def test_a_line_of_metrics_that_spans_the_stop_is_the_same(tmp_path, train_here):
    for run, ends in (("whole", (8,)), ("parts", (3, 8))):
        for end in ends:
            train_here("dit", tmp_path / run, f"--max-steps {end} --log-every 4 {EXACT}")
    whole, parts = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts"))
    timeless = ("loss", "gradient_norm", "samples_seen", "learning_rate")
    by_step = {line["step"]: {name: line[name] for name in timeless} for line in parts}
    # A run that ends between two lines says where it ended as well.
    assert set(by_step) == {3, 4, 8}
    for line in whole:
        assert by_step[line["step"]] == {name: line[name] for name in timeless}


@pytest.mark.parametrize("micro", [4, 3, 2])
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    micro, tmp_path, train_here, checkpoint_tensors, losses
):
    train_here("dit", tmp_path / "whole", f"--max-steps 4 {EXACT}")
    train_here("dit", tmp_path / "micro", f"--max-steps 4 --micro-batch-size {micro} {EXACT}")
    whole, micro_losses = losses(tmp_path / "whole"), losses(tmp_path / "micro")
    for step, loss in whole.items():
        assert micro_losses[step] == pytest.approx(loss, rel=1e-5)
    one, other = checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(tmp_path / "micro")
    for name, tensor in one.items():
        if name.startswith("ema-0.9"):
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, train_here, caplog):
    train_here("dit", tmp_path, "--max-steps 2")
    before = (tmp_path / "snapshots/latest.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert train_here("dit", tmp_path, "--max-steps 2") == 0
    assert "already reached step 2" in caplog.text
    assert (tmp_path / "snapshots/latest.safetensors").stat().st_mtime_ns == before


def test_another_fixed_setting_is_refused_with_a_diff_unless_it_is_allowed(tmp_path, train_here):
    train_here("dit", tmp_path, "--max-steps 1")
    with pytest.raises(UsageError, match=r"optimizer\.lr: [0-9.]+ → 0\.5.*--allow-change optimizer\.lr"):
        train_here("dit", tmp_path, "--max-steps 2 --optimizer.lr 0.5")
    assert train_here("dit", tmp_path, "--max-steps 2 --optimizer.lr 0.5 --allow-change optimizer.lr") == 0
    # What was allowed once is from then on the run's own.
    assert train_here("dit", tmp_path, "--max-steps 3 --optimizer.lr 0.5") == 0


def test_a_network_of_another_shape_is_refused_in_one_line_and_the_run_s_settings_stay(tmp_path, train_here):
    assert train_here("dit", tmp_path, "--max-steps 1") == 0
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        UserError, match=r"is \(1, 16, 16\) in the checkpoint and \(1, 16, 32\) by settings and store"
    ):
        train_here("dit", tmp_path, "--max-steps 2 --model.width 32 --allow-change model.width")
    assert (tmp_path / "config.json").read_bytes() == before
    assert train_here("dit", tmp_path, "--max-steps 2") == 0


def test_a_checkpoint_the_run_was_continued_from_is_not_written_again(tmp_path, train_here, monkeypatch):
    train_here("dit", tmp_path, "--max-steps 2")
    path = tmp_path / "checkpoints/step-00000002"
    before = path.stat().st_ino
    # Told to stop before its first step, a continued run has nothing new to save.
    monkeypatch.setattr("train.engine.loop.Trainer.due", lambda self, every: False)
    monkeypatch.setattr("train.engine.loop.Trainer.train_step", None)
    monkeypatch.setattr("train.engine.launch.finished", lambda *run: False)
    assert train_here("dit", tmp_path, "--max-steps 2") == 0
    assert path.stat().st_ino == before
    assert checkpoints(tmp_path / "checkpoints") == [path]


def test_free_settings_may_change(tmp_path, train_here):
    train_here("dit", tmp_path, "--max-steps 1")
    free = "--max-steps 2 --micro-batch-size 3 --threads 1 --checkpoint-every 1 --log-every 2 --keep-checkpoints 1"
    assert train_here("dit", tmp_path, free) == 0


def test_the_settings_of_a_run_start_another_one(tmp_path, train_here, losses):
    from train.dit import main

    train_here("dit", tmp_path / "first", "--max-steps 2 --optimizer.lr 0.01")
    assert main([str(tmp_path / "first/config.json"), "--out", str(tmp_path / "second")]) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_another_store_is_refused(tmp_path, train_here, make_store):
    train_here("dit", tmp_path / "run", "--max-steps 1")
    other = make_store(tmp_path / "store", num_images=21)
    with pytest.raises(UserError, match="another store"):
        train_here("dit", tmp_path / "run", "--max-steps 2", store=other)
    assert train_here("dit", tmp_path / "run", "--max-steps 2 --allow-change store", store=other) == 0


def test_a_damaged_newest_checkpoint_is_refused_and_without_it_the_run_continues_as_before(
    tmp_path, train_here, checkpoint_tensors
):
    train_here("dit", tmp_path / "whole", "--max-steps 4")
    train_here("dit", tmp_path / "run", "--max-steps 2 --checkpoint-every 1")
    newest = tmp_path / "run/checkpoints/step-00000002"
    weights = newest / "ema-0.5.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 128
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"ema-0\.5\.safetensors is damaged.*to continue from step-00000001"):
        train_here("dit", tmp_path / "run", "--max-steps 4")
    shutil.rmtree(newest)
    assert train_here("dit", tmp_path / "run", "--max-steps 4") == 0
    assert_same(*(checkpoint_tensors(tmp_path / name) for name in ("whole", "run")))


def test_an_empty_folder_of_a_later_step_does_not_finish_a_run(tmp_path, train_here):
    (tmp_path / "checkpoints/step-99999999999").mkdir(parents=True)
    assert train_here("dit", tmp_path, "--max-steps 1") == 0
    assert (tmp_path / "checkpoints/step-00000001/state.json").is_file()


def test_a_second_trainer_in_the_same_directory_is_refused(tmp_path, train_here):
    with (
        FolderLock(tmp_path),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "),
    ):
        train_here("dit", tmp_path, "--max-steps 1")
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    assert train_here("dit", tmp_path, "--max-steps 1") == 0


@pytest.mark.parametrize("more", ["--checkpoint-every 1 --snapshot-every 1", "--log-every 100"])
def test_a_trainer_whose_directory_was_taken_over_writes_nothing_more(tmp_path, train_here, more):
    train_here("dit", tmp_path, "--max-steps 1")
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    elsewhere = json.dumps({"host": "elsewhere", "pid": 7, "started": "before"})

    def take_over(*arguments):
        (tmp_path / ".lock").write_text(elsewhere)

    hook = register_optimizer_step_post_hook(take_over)
    try:
        with pytest.raises(
            UserError, match="was taken over by process 7 on elsewhere while this process stood"
        ):
            train_here("dit", tmp_path, f"--max-steps 2 {more}")
    finally:
        hook.remove()
    assert (tmp_path / ".lock").read_text() == elsewhere
    changed = {
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() != written.get(path)
    }
    assert changed == {".lock", "config.json"}  # which says that the run was to go on


def test_old_checkpoints_are_pruned_and_milestones_kept(tmp_path, train_here):
    train_here(
        "dit",
        tmp_path,
        "--max-steps 5 --checkpoint-every 1 --keep-checkpoints 2 --milestone-every 2 --ema-rates 0.9",
    )
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000005"]
    kept = {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert kept == {"latest.safetensors", "step-00000002.safetensors", "step-00000004.safetensors"}


def test_lines_after_the_checkpoint_of_a_killed_run_are_replaced(tmp_path, train_here, losses):
    train_here("dit", tmp_path, "--max-steps 3")
    expected = losses(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 99.0}) + "\n" + '{"step": 5, "lo')
    train_here("dit", tmp_path, "--max-steps 4")
    found = losses(tmp_path)
    assert found[4] != 99.0
    assert {step: found[step] for step in expected} == expected


def test_a_damaged_checkpoint_is_named(tmp_path, train_here):
    train_here("dit", tmp_path, "--max-steps 1")
    damaged = tmp_path / "checkpoints/step-00000001/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors should have"):
        train_here("dit", tmp_path, "--max-steps 2")
