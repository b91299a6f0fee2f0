"""Several processes train the run that one process would, and every launcher's signals end in a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shards.errors import UsageError
from train.engine.checkpoint import checkpoints, read_state
from train.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [str(BIN / "accelerate"), "launch"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
}
EXACT = "--checkpoint-every 100 --snapshot-every 100"


def torchrun(processes, arguments, script="train/dit.py"):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("max_steps", [2, 4])
def test_processes_that_see_different_checkpoints_are_refused_whether_or_not_one_is_finished(
    max_steps, tmp_path, arguments, train_here
):
    train_here("dit", tmp_path / "run-0", f"--max-steps 2 {EXACT}")
    command = [*LAUNCHERS["torchrun"], "tests/train/node_local_run.py"]
    done = subprocess.run(
        [*command, *arguments("dit", tmp_path / "run", f"--max-steps {max_steps} {EXACT}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    message = "step-00000002 to process 0 and none to process 1; put --out on a disk that all processes share"
    assert message in done.stderr, done.stderr[-2000:]
    assert [path.name for path in checkpoints(tmp_path / "run-0/checkpoints")] == ["step-00000002"]


# 3 does not divide the batch of 8; the shares are 3, 3 and 2.
@pytest.mark.parametrize("trainer", ["dit", "raev2"])
@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_stop_and_another_number_continues(
    processes, trainer, tmp_path, arguments, train_here, checkpoint_tensors, losses
):
    train_here(trainer, tmp_path / "one", f"--max-steps 6 {EXACT}")
    torchrun(2, arguments(trainer, tmp_path / "several", f"--max-steps 3 {EXACT}"))
    if processes == 1:
        train_here(trainer, tmp_path / "several", f"--max-steps 6 {EXACT}")
    else:
        torchrun(processes, arguments(trainer, tmp_path / "several", f"--max-steps 6 {EXACT}"))
    one, several = losses(tmp_path / "one"), losses(tmp_path / "several")
    assert several.keys() == one.keys()
    for step, loss in one.items():
        assert several[step] == pytest.approx(loss, rel=1e-5)
    found = checkpoint_tensors(tmp_path / "several")
    for name, tensor in checkpoint_tensors(tmp_path / "one").items():
        if name.startswith(("ema-0.9", "optimizer/exp_avg/", "optimizer/momentum/")):
            assert (tensor - found[name]).abs().max() <= 1e-4 * max(1.0, tensor.abs().max()), name


def alive(marker):
    """Processes whose command line holds the text."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if marker in line:
                found.append(int(folder.name))
    return found


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def heed_interrupts():
    """Undo what a shell does to its background jobs, which this test run may be one of: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


CASES = [
    ("accelerate", signal.SIGTERM, "launcher"),
    *(
        pytest.param(launcher, number, target, marks=pytest.mark.slow)
        for launcher in LAUNCHERS
        for number in (signal.SIGTERM, signal.SIGINT)
        for target in ("launcher", "group", "rank")
        if (launcher, number, target) != ("accelerate", signal.SIGTERM, "launcher")
    ),
]


@pytest.mark.parametrize(("launcher", "number", "target"), CASES)
def test_a_signal_ends_in_a_checkpoint_all_ranks_took_at_one_step(
    launcher, number, target, tmp_path, arguments, train_here
):
    out = tmp_path / "run"
    command = [*LAUNCHERS[launcher], "train/dit.py", *arguments("dit", out, "--max-steps 1000000")]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        try:
            wait_until(lambda: len(read_metrics(out / "metrics.jsonl")) >= 2, 120, "training")
            if target == "group":
                os.killpg(process.pid, number)
            else:
                ranks = [pid for pid in alive(str(out)) if pid != process.pid] or [process.pid]
                os.kill(process.pid if target == "launcher" else ranks[-1], number)
            wait_until(lambda: not alive(str(out)), 60, "the end of every process")
        finally:
            for pid in alive(str(out)):
                os.kill(pid, signal.SIGKILL)
            process.wait(10)
    newest = checkpoints(out / "checkpoints")
    assert newest, (tmp_path / "output").read_text()[-2000:]
    step = read_state(newest[-1]).step
    assert step >= 2
    assert train_here("dit", out, f"--max-steps {step + 1}") == 0
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, step + 2))


def kill_during_checkpoint(trainer, out, arguments, moment):
    """Kill a run that writes a checkpoint each step, `moment` seconds after its first checkpoint."""
    command = [
        sys.executable,
        "train/dit.py",
        *arguments(trainer, out, "--max-steps 1000000 --checkpoint-every 1"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        before = len(checkpoints(out / "checkpoints")) and checkpoints(out / "checkpoints")[-1].name
        wait_until(
            lambda: checkpoints(out / "checkpoints") and checkpoints(out / "checkpoints")[-1].name != before,
            120,
            "training",
        )
        time.sleep(moment)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("trainer", "moments"),
    [
        ("dit", (0.05, 0.11)),
        ("raev2", (0.08,)),
        pytest.param("dit", tuple(i * 0.017 for i in range(20)), marks=pytest.mark.slow),
    ],
)
def test_a_kill_during_a_checkpoint_never_loses_the_one_before(
    trainer, moments, tmp_path, arguments, train_here, losses
):
    reached = 0
    for moment in moments:
        kill_during_checkpoint(trainer, tmp_path / "run", arguments, moment)
        newest = checkpoints(tmp_path / "run/checkpoints")[-1]
        step = read_state(newest).step
        assert step > reached
        reached = step
    end = f"--max-steps {reached + 1} --checkpoint-every 1000"
    assert train_here(trainer, tmp_path / "run", end) == 0
    assert train_here(trainer, tmp_path / "whole", end) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["dit", "raev2"])
def test_sharded_weights_train_the_same_run_and_one_process_continues_it(
    trainer, tmp_path, arguments, train_here, checkpoint_tensors, losses
):
    train_here(trainer, tmp_path / "one", f"--max-steps 5 {EXACT}")
    torchrun(
        2, arguments(trainer, tmp_path / "sharded", f"--max-steps 3 {EXACT}"), "tests/train/sharded_run.py"
    )
    found = checkpoint_tensors(tmp_path / "sharded")
    assert found.keys() == checkpoint_tensors(tmp_path / "one").keys()
    train_here(trainer, tmp_path / "sharded", f"--max-steps 5 {EXACT}")
    one, sharded = losses(tmp_path / "one"), losses(tmp_path / "sharded")
    assert sharded.keys() == one.keys()
    for step, loss in one.items():
        assert sharded[step] == pytest.approx(loss, rel=1e-5)


# In float16 the directions that a gradient does not have are rounding's (parity/test_raev2_training.py).
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("half", "rel"), [(False, 1e-4), (True, 3e-2)], ids=["float32", "float16"])
def test_muon_with_sharded_weights_trains_what_one_device_does_and_it_continues_the_run(
    half, rel, tmp_path, arguments, train_here, losses
):
    more = f"{EXACT} --precision fp32 --optimizer.half {half}"
    train_here("raev2", tmp_path / "one", f"--max-steps 5 {more}")
    sharded = arguments("raev2", tmp_path / "sharded", f"--max-steps 3 {more} --sharding fsdp")
    torchrun(min(2, torch.cuda.device_count()), sharded)
    train_here("raev2", tmp_path / "sharded", f"--max-steps 5 {more}")
    one, found = losses(tmp_path / "one"), losses(tmp_path / "sharded")
    assert found.keys() == one.keys()
    for step, loss in one.items():
        assert found[step] == pytest.approx(loss, rel=rel)


@pytest.mark.slow  # runs the compiler
@pytest.mark.parametrize("script", ["train/dit.py", "tests/train/sharded_run.py"], ids=["ddp", "fsdp"])
def test_one_pass_in_two_processes_trains_the_same_and_is_continued_in_separate_passes(
    script, tmp_path, train_here, arguments, losses
):
    train_here("dit", tmp_path / "one", f"--max-steps 5 {EXACT}")
    torchrun(2, arguments("dit", tmp_path / "two", f"--max-steps 3 --one-pass True {EXACT}"), script)
    train_here("dit", tmp_path / "two", f"--max-steps 5 {EXACT}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two.keys() == one.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-5)


def test_asking_for_fsdp_without_cuda_is_refused(tmp_path, train_here, monkeypatch):
    with pytest.raises(UsageError, match="FSDP needs CUDA"):
        train_here("dit", tmp_path, "--max-steps 1 --sharding fsdp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP needs CUDA"):
        train_here("dit", tmp_path, "--max-steps 1")


def test_processes_that_did_not_find_each_other_are_refused(tmp_path, train_here, monkeypatch):
    # In this process Accelerate's team of one already stands.
    train_here("dit", tmp_path, "--max-steps 1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="launcher started 2 processes"):
        train_here("dit", tmp_path, "--max-steps 2")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_of_accelerate_are_refused_in_one_line(engine, tmp_path, train_here, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UsageError, match="only DDP and FSDP are supported"):
        train_here("dit", tmp_path, "--max-steps 1")


@pytest.mark.slow
def test_the_slurm_script_saves_and_queues_again_before_its_time_is_over(tmp_path, arguments):
    out, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (tools / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    command = [
        "bash",
        "docs/slurm/train.sbatch",
        "train/dit.py",
        *arguments("dit", out, "--max-steps 1000000"),
    ]
    with (tmp_path / "output").open("w") as output:
        shell = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            wait_until(lambda: len(read_metrics(out / "metrics.jsonl")) >= 2, 120, "training")
            shell.terminate()
            assert shell.wait(60) == 0
        finally:
            for pid in alive(str(out)):
                os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    assert checkpoints(out / "checkpoints"), (tmp_path / "output").read_text()[-2000:]
