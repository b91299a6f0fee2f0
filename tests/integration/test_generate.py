"""The generation command as users start it: the same samples for any launcher and number of processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from eval.generate.plan import plan_of
from eval.generate.run import generate
from eval.settings import GenerationSettings
from shards import UserError
from shards.metadata.identity import EncoderIdentity
from train.models.build import build_model
from train.models.config import DiTConfig, ViTDecoderConfig
from train.models.normalizer import LatentNormalizer
from train.weights.snapshot import SnapshotMeta, save_snapshot

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NUM = 7


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A DiT and a decoder with random weights, and nothing else: generation needs no store."""
    folder = tmp_path_factory.mktemp("snapshots")
    encoder = EncoderIdentity(
        name="tiny",
        weights="random:0",
        weights_digest="0" * 64,
        preprocessing={},
        input_size=16,
        grid=(2, 2),
        width=8,
        prefix_tokens=0,
        final_norm="layernorm-no-affine",
    )
    meta = SnapshotMeta(
        encoder=encoder.to_dict(),
        class_names=("cat", "rocket"),
        num_classes=2,
        grid=(2, 2),
        width=8,
        step=1,
        samples_seen=1,
        ema_rate=0.9,
    )
    torch.manual_seed(0)
    shape = DiTConfig(token_width=8, grid=(2, 2), num_classes=2, width=16, depth=1, num_heads=2)
    model = build_model(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    normalizer = LatentNormalizer(None, torch.ones(8, 2, 2))
    save_snapshot(folder / "dit", model.state_dict(), config=shape, normalizer=normalizer, meta=meta)
    drawing = ViTDecoderConfig(
        token_width=8, grid=(2, 2), width=16, depth=1, num_heads=2, mlp_width=32, patch_size=8
    )
    weights = build_model(drawing).state_dict()
    save_snapshot(folder / "decoder", weights, config=drawing, normalizer=None, meta=meta)
    return folder


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _command(launcher, snapshots, out, *more, num=NUM, points=3):
    return [
        *launcher,
        str(ROOT / "eval" / "generation.py"),
        str(snapshots / "dit"),
        *("--decoder", str(snapshots / "decoder")),
        *("--num-samples", str(num)),
        *("--points", str(points)),
        *("--seed", "5"),
        *("--out", str(out)),
        *more,
    ]


def _start(launcher, snapshots, out, *more, **shape):
    command = _command(launcher, snapshots, out, *more, **shape)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=out.parent, env=ENVIRONMENT, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return _images(out), json.loads((out / "results.json").read_text())


def _images(out):
    with np.load(out / "samples.npz") as archive:
        return archive["arr_0"]


@pytest.fixture(scope="module")
def alone(snapshots, tmp_path_factory):
    """Samples of one process, uint8 [n, H, W, 3]."""
    out = tmp_path_factory.mktemp("alone")
    settings = GenerationSettings(
        snapshot=snapshots / "dit", decoder=snapshots / "decoder", num_samples=NUM, points=3, seed=5, out=out
    )
    assert generate(plan_of(settings))["processes"] == 1
    return _images(out)


def test_generation_whose_folder_was_taken_over_publishes_nothing(snapshots, tmp_path):
    settings = GenerationSettings(
        snapshot=snapshots / "dit", decoder=snapshots / "decoder", num_samples=2, points=2, out=tmp_path
    )
    elsewhere = json.dumps({"host": "elsewhere", "pid": 7, "started": "before"})

    def take_over(*arguments):
        (tmp_path / ".lock").write_text(elsewhere)

    hook = register_module_forward_hook(take_over)
    try:
        with pytest.raises(UserError, match="was taken over by process 7 on elsewhere"):
            generate(plan_of(settings))
    finally:
        hook.remove()
    assert (tmp_path / ".lock").read_text() == elsewhere
    assert not {"samples.npz", "grid.png", "results.json"} & {path.name for path in tmp_path.iterdir()}


def _torchrun(processes):
    return [str(BIN / "torchrun"), "--nproc_per_node", str(processes), "--standalone"]


def _differ_by_one_level_at_most(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_two_processes_give_the_samples_of_one(snapshots, alone, tmp_path):
    shared, results = _start(_torchrun(2), snapshots, tmp_path / "shared", "--batch-size", "2")
    assert results["processes"] == 2
    assert _differ_by_one_level_at_most(alone, shared)


@pytest.mark.slow
def test_three_processes_give_the_samples_of_one(snapshots, alone, tmp_path):
    shared, results = _start(_torchrun(3), snapshots, tmp_path / "shared", "--batch-size", "1")
    assert results["processes"] == 3
    assert _differ_by_one_level_at_most(alone, shared)


@pytest.mark.slow
def test_accelerate_launch_and_plain_python_give_the_same_samples(snapshots, alone, tmp_path):
    accelerate = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    for name, launcher in {"launched": accelerate, "plain": [sys.executable]}.items():
        images, _ = _start(launcher, snapshots, tmp_path / name)
        assert _differ_by_one_level_at_most(alone, images)


MANY = {"num": 60, "points": 30}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_generation_killed_at_any_moment_gives_the_samples_of_an_uninterrupted_one(
    processes, snapshots, tmp_path
):
    one_by_one = ("--batch-size", "1")
    whole, _ = _start([sys.executable], snapshots, tmp_path / "whole", *one_by_one, **MANY)
    launcher = [sys.executable] if processes == 1 else _torchrun(processes)
    out = tmp_path / "killed"
    command = _command(launcher, snapshots, out, *one_by_one, **MANY)
    # Kills while sampling, the last as soon as every sample is written; one may come after a later stage has begun.
    moments = sorted(np.random.default_rng(processes).integers(1, MANY["num"], 3).tolist())
    for moment in [0, *moments, MANY["num"]]:
        _kill_when(command, out, moment)
    images, results = _start(launcher, snapshots, out, *one_by_one, **MANY)
    assert results["sampled_now"] < MANY["num"]
    np.testing.assert_array_equal(images, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def _kill_when(command, out, num_written):
    """Start a command and kill it and all its children as soon as so many samples are marked as written."""
    running = subprocess.Popen(
        command, cwd=out.parent, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while _num_written(out) < num_written and running.poll() is None:
        assert time.monotonic() < deadline, f"{num_written} samples were not written within 120 s"
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _num_written(out):
    """Samples there are; -1 before there is a place for them."""
    if (out / "samples.npz").exists():
        return MANY["num"]
    try:
        return sum((out / "samples.npz.written").read_bytes())
    except FileNotFoundError:
        return -1
