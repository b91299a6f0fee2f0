"""Rows left out of training are never drawn, and measure the averaged weights as the evaluation would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.reconstruction import main as evaluate
from shards.errors import IdentityMismatchError, UsageError
from shards.reading.loader import Loader
from shards.reading.store import open_store
from train.engine.held_out import split_rows
from train.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
MEASURED = "--held-out 6 --evaluate-every 2"


def held_out(out, prefix="held_out_"):
    return [line for line in read_metrics(out / "metrics.jsonl") if f"{prefix}psnr" in line]


def test_rows_left_out_are_a_function_of_the_seed_and_never_drawn(store_path):
    store = open_store(store_path)
    trained, left_out = split_rows(store.valid_rows, 6, seed=3)
    assert len(left_out) == 6
    np.testing.assert_array_equal(np.sort(np.concatenate([trained, left_out])), store.valid_rows)
    np.testing.assert_array_equal(split_rows(store.valid_rows, 6, seed=3)[1], left_out)
    assert not np.array_equal(split_rows(store.valid_rows, 6, seed=4)[1], left_out)
    with Loader(store, rows=trained, seed=3, global_batch_size=8) as loader:
        batches = iter(loader)
        drawn = []
        for _ in range(6):  # three epochs of 16 rows
            batch = next(batches)
            drawn.extend(batch.rows.tolist())
            batch.release()
    assert sorted(drawn) == sorted(trained.tolist() * 3)


def test_none_left_out_is_every_row_and_all_left_out_is_refused(store_path):
    rows = open_store(store_path).valid_rows
    np.testing.assert_array_equal(split_rows(rows, 0, seed=0)[0], rows)
    with pytest.raises(UsageError, match="leaves nothing to train on"):
        split_rows(rows, len(rows), seed=0)


def test_halves_measure_what_the_whole_run_measures(tmp_path, train_here, losses):
    train_here("decoder", tmp_path / "whole", f"--max-steps 4 {MEASURED}")
    for end in (2, 4):
        train_here("decoder", tmp_path / "halves", f"--max-steps {end} {MEASURED}")
    whole = held_out(tmp_path / "whole")
    assert [line["step"] for line in whole] == [2, 4]
    assert whole == held_out(tmp_path / "halves")
    assert whole[0].keys() == {"step", "held_out_psnr", "held_out_ssim"}
    page = (tmp_path / "whole/index.html").read_text()
    assert "held_out_psnr" in page


def test_measuring_changes_nothing_that_is_trained(tmp_path, train_here, checkpoint_tensors):
    train_here("decoder", tmp_path / "measured", f"--max-steps 4 {MEASURED}")
    train_here("decoder", tmp_path / "plain", "--max-steps 4 --held-out 6")
    plain = checkpoint_tensors(tmp_path / "plain")
    assert all(
        tensor.equal(plain[name]) for name, tensor in checkpoint_tensors(tmp_path / "measured").items()
    )


def test_another_stores_figures_are_those_of_the_evaluation(tmp_path, train_here, make_store, monkeypatch):
    other = make_store(tmp_path / "other", num_images=7)
    run = tmp_path / "run"
    train_here("decoder", run, f"--max-steps 2 --evaluate-every 2 --evaluation-store {other}")
    words = (
        f"{other} --decoder {run}/snapshots/latest.safetensors --out {tmp_path}/scores --metrics psnr ssim"
    )
    results = evaluate_here(words, tmp_path / "scores")
    (line,) = held_out(run)
    assert line["held_out_psnr"] == pytest.approx(results["psnr"], rel=1e-6)
    assert line["held_out_ssim"] == pytest.approx(results["ssim"], rel=1e-6)


def evaluate_here(words, out):
    import json

    assert evaluate(words.split()) == 0
    return json.loads((out / "results.json").read_text())


def test_images_must_be_there_and_of_the_same_encoder(tmp_path, train_here, make_store):
    with pytest.raises(UsageError, match="--held-out N"):
        train_here("decoder", tmp_path / "run", "--max-steps 1 --evaluate-every 1")
    wider = make_store(tmp_path / "wider", num_images=3, num_shards=1, width=4)
    with pytest.raises(IdentityMismatchError, match="evaluation-store"):
        train_here(
            "decoder", tmp_path / "run", f"--max-steps 1 --evaluate-every 1 --evaluation-store {wider}"
        )


def test_other_rows_left_out_are_another_run(tmp_path, train_here):
    train_here("dit", tmp_path, "--max-steps 1 --held-out 6")
    with pytest.raises(UsageError, match="held_out: 6 → 0"):
        train_here("dit", tmp_path, "--max-steps 2")


@pytest.mark.slow
def test_processes_share_the_measuring(tmp_path, arguments, train_here):
    # Six images do not divide by four, so one process draws an image twice.
    train_here("decoder", tmp_path / "one", f"--max-steps 2 {MEASURED}")
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "4"]
    words = arguments("decoder", tmp_path / "four", f"--max-steps 2 {MEASURED}")
    done = subprocess.run(
        [*command, "train/decoder.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (one,), (four,) = held_out(tmp_path / "one"), held_out(tmp_path / "four")
    assert four == pytest.approx(one, rel=1e-4)
