"""The adversarial part: its schedule, resume, and that dividing the batch changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from shards.errors import UsageError
from train.models.discriminator import DINO_SIZES, DinoConfig, DinoFeatures
from train.models.perceptual import Perceptual
from train.report.metrics_file import read_metrics
from train.tasks.frozen_networks import load_dino_features, load_perceptual

ROOT = Path(__file__).parents[2]
TINY_DINO = DinoConfig(patch_size=56, width=16, depth=2, num_heads=2, key_depths=(0, 1))
# 22 images in batches of 8 are 2 steps an epoch: the discriminator learns from step 2, the decoder against it from 4.
SCHEDULE = (
    "--adversarial True --adversary.learns-from-epoch 1 --adversary.plays-from-epoch 2 --checkpoint-every 100"
    " --adversary.kernel-size 3"
)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Command-line words that name the weights of a tiny frozen network."""
    monkeypatch.setitem(DINO_SIZES, "S_8", TINY_DINO)
    torch.manual_seed(5)
    state = DinoFeatures(TINY_DINO).vit.state_dict()
    torch.save(state, tmp_path / "dino.pth")
    return f"{SCHEDULE} --discriminator-weights {tmp_path}/dino.pth"


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        off = (tensor - other[name]).abs().max()
        assert off <= tolerance * max(1.0, tensor.abs().max()), (name, off)


def of_interest(tensors):
    """Averages and first moments, whose rounding is not enlarged as Adam's quotient enlarges it."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("ema-0.9/", "optimizer/exp_avg/", "discriminator_optimizer/exp_avg/"))
    }


def test_halves_equal_the_whole_bit_for_bit_and_the_parts_begin_on_time(
    tmp_path, train_here, weights, checkpoint_tensors
):
    train_here("decoder", tmp_path / "whole", f"--max-steps 6 {weights}")
    for end in (3, 6):
        train_here("decoder", tmp_path / "halves", f"--max-steps {end} {weights}")
    whole, halves = (checkpoint_tensors(tmp_path / run) for run in ("whole", "halves"))
    assert any(name.endswith("weight_u") for name in whole)
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name
    lines = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert [line["loss"] for line in lines] == [
        line["loss"] for line in read_metrics(tmp_path / "halves/metrics.jsonl")
    ]
    assert ["discriminator_loss" in line for line in lines] == [False] * 2 + [True] * 4
    assert ["adaptive_weight" in line for line in lines] == [False] * 4 + [True] * 2
    assert all(line["loss"] == pytest.approx(line["l1"]) for line in lines[:4])
    page = (tmp_path / "whole/index.html").read_text()
    assert "λ, weight of the adversarial loss" in page
    assert "discriminator_accuracy 0." in page or "discriminator_accuracy 1" in page


def test_micro_batches_share_one_balance_and_give_the_whole_batchs_gradients(
    tmp_path, train_here, weights, checkpoint_tensors
):
    train_here("decoder", tmp_path / "whole", f"--max-steps 6 {weights}")
    train_here("decoder", tmp_path / "micro", f"--max-steps 6 --micro-batch-size 3 {weights}")
    whole, micro = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "micro"))
    for one, other in zip(whole, micro, strict=True):
        for name in ("loss", "adaptive_weight", "adversarial", "discriminator_loss"):
            assert other.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=1e-3, abs=1e-5), name
    assert_close(*(of_interest(checkpoint_tensors(tmp_path / run)) for run in ("whole", "micro")), 1e-3)


@pytest.mark.slow
def test_two_processes_train_both_networks_as_one_process_does(
    tmp_path, arguments, train_here, weights, checkpoint_tensors
):
    train_here("decoder", tmp_path / "one", f"--max-steps 6 {weights}")
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    several = arguments("decoder", tmp_path / "several", f"--max-steps 6 {weights}")
    done = subprocess.run(
        [*command, "tests/train/tiny_dino_run.py", *several],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(*(of_interest(checkpoint_tensors(tmp_path / run)) for run in ("one", "several")), 1e-3)


def test_the_perceptual_distance_comes_from_a_file(tmp_path, train_here):
    vgg = {name: value for name, value in Perceptual().state_dict().items() if name.startswith("features.")}
    torch.save({**vgg, "classifier.0.bias": torch.zeros(1)}, tmp_path / "vgg16.pth")
    more = f"--max-steps 2 --perceptual lpips --perceptual-weights {tmp_path}/vgg16.pth --held-out 3 --evaluate-every 2"
    assert train_here("decoder", tmp_path / "run", more) == 0
    *lines, measured = read_metrics(tmp_path / "run/metrics.jsonl")
    assert measured.keys() == {"step", "held_out_psnr", "held_out_ssim", "held_out_lpips"}
    assert measured["held_out_lpips"] > 0
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1"] + line["lpips"], rel=1e-5)


def test_weights_that_cannot_be_had_are_said_how_to_get(monkeypatch):
    def unreachable(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UsageError, match="--perceptual none"):
        load_perceptual(None)
    with pytest.raises(UsageError, match="--adversarial False"):
        load_dino_features(None)
