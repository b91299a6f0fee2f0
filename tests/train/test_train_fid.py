"""FID of a few samples during training: measured by all processes together, and training goes on as without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import IdentityMismatchError, UsageError
from train.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fid(tmp_path, train_here):
    """Options that measure the FID of 6 samples every 2 steps, against a few random images."""
    assert train_here("decoder", tmp_path / "decoder", "--max-steps 1") == 0
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    return (
        f"--fid-every 2 --fid-samples 6 --fid-reference {tmp_path / 'real.npz'} --fid-weights random:0 "
        f"--decoder {tmp_path / 'decoder/snapshots/latest.safetensors'}"
    )


def fids(out):
    return {line["step"]: line["fid"] for line in read_metrics(out / "metrics.jsonl") if "fid" in line}


def training(out):
    """What training measured, without its speed."""
    timed = ("images_per_second", "step_seconds", "data_wait")
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def test_measuring_changes_nothing_of_the_training(tmp_path, train_here, fid, checkpoint_tensors):
    assert train_here("dit", tmp_path / "with", f"--max-steps 3 {fid}") == 0
    assert train_here("dit", tmp_path / "without", "--max-steps 3") == 0
    assert training(tmp_path / "with") == training(tmp_path / "without")
    expected = checkpoint_tensors(tmp_path / "without")
    for name, tensor in checkpoint_tensors(tmp_path / "with").items():
        assert torch.equal(tensor, expected[name]), name
    found = fids(tmp_path / "with")
    assert found.keys() == {2}
    assert found[2] > 0
    assert "FID of a few samples" in (tmp_path / "with/index.html").read_text()


@pytest.mark.slow
def test_a_continued_run_and_more_processes_measure_the_same(tmp_path, train_here, arguments, fid):
    assert train_here("dit", tmp_path / "whole", f"--max-steps 4 {fid}") == 0
    assert train_here("dit", tmp_path / "parts", f"--max-steps 3 {fid}") == 0
    assert train_here("dit", tmp_path / "parts", f"--max-steps 4 {fid}") == 0
    whole = fids(tmp_path / "whole")
    assert fids(tmp_path / "parts") == whole
    assert whole.keys() == {2, 4}
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "4"]
    # Four processes draw two samples each, of which the last process's are beyond the sixth.
    command = [*torchrun, "train/dit.py", *arguments("dit", tmp_path / "four", f"--max-steps 4 {fid}")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    assert fids(tmp_path / "four") == pytest.approx(whole, rel=1e-2)


def test_it_needs_a_decoder_of_the_same_encoder(tmp_path, train_here, make_store, fid):
    without_decoder = fid.partition("--decoder")[0]
    with pytest.raises(UsageError, match="--fid-every needs a decoder"):
        train_here("dit", tmp_path / "a", f"--max-steps 1 {without_decoder}")
    other = make_store(tmp_path / "store", width=12)
    with pytest.raises(IdentityMismatchError):
        train_here("dit", tmp_path / "b", f"--max-steps 1 {fid}", store=other)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("--fid-every 2", "give --fid-reference"),
        ("--fid-every 2 --fid-reference nowhere", "found nowhere"),
        ("--fid-every 0", "--fid-every must be at least 1"),
        ("--fid-samples 1", "--fid-samples must be at least 2"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(tmp_path, train_here, settings, reason):
    with pytest.raises(UsageError, match=reason):
        train_here("dit", tmp_path, f"--max-steps 1 {settings}")
