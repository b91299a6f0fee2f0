"""The real command under every engine: the same store, whoever did the work and whoever died."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import TINY_ENCODER

from pipeline.cli import main

ARGUMENTS = ["--shards", "6", "--batch-size", "4", *TINY_ENCODER]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 30 photographs."""
    root = tmp_path_factory.mktemp("source")
    for number in range(30):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(root / f"{number:02d}.png")
    return root


def command(source, store, *more):
    """`python -m pipeline encode` with the arguments of these tests."""
    return [sys.executable, "-m", "pipeline", "encode", str(source), "--out", str(store), *ARGUMENTS, *more]


def run(arguments, **environment):
    """Runs a command to its end; gives its exit code and all it printed."""
    done = subprocess.run(
        arguments, env={**os.environ, **environment}, text=True, capture_output=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The store of one process that worked alone."""
    store = tmp_path_factory.mktemp("whole") / "store"
    code, output = run(command(source, store))
    assert code == 0, output
    return store


def lasting_files(store):
    """Content of every file that must not depend on who did the work."""
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    kept = (
        name for name in files if not name.startswith(("commits/", "manifest")) and not name.endswith(".tmp")
    )
    return {name: files[name].read_bytes() for name in kept}


def kill_first_worker(store, pid_of):
    """Kills the first worker that is seen at work, and waits until then."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for lease in store.glob(".work/leases/shard-*.json"):
            try:
                owner = json.loads(lease.read_text())["owner"]
            except (FileNotFoundError, ValueError):
                continue
            os.kill(pid_of(owner), 9)
            return owner["name"]
        time.sleep(0.002)
    raise AssertionError("no worker was seen")


def test_ranks_started_by_somebody_else_share_the_work(source, whole, tmp_path):
    store = tmp_path / "store"
    arguments = command(source, store, "--engine", "static")
    ranks = [
        subprocess.Popen(
            arguments,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    outputs = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert lasting_files(store) == lasting_files(whole)


@pytest.mark.parametrize(
    ("engine", "environment", "named"),
    [
        ("local", {"RANK": "0", "WORLD_SIZE": "2"}, "add --engine static"),
        ("static", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE, got 2 of 2"),
        ("static", {"RANK": "0"}, "needs WORLD_SIZE"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(
    source, tmp_path, monkeypatch, capsys, engine, environment, named
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(command(source, tmp_path / "store", "--engine", engine)[3:]) == 2
    assert named in capsys.readouterr().err


def slurm_command(source, store):
    """The command for an array of two tasks."""
    return command(source, store, "--engine", "slurm", "--slurm-tasks", "2", "--slurm-args=--time=1:00:00")


def test_slurm_prints_the_script_of_an_array_and_does_nothing(source, tmp_path, capsys):
    assert main(slurm_command(source, tmp_path / "store")[3:]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --time=1:00:00\n" in script
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_make_the_store(source, whole, tmp_path):
    store = tmp_path / "store"
    (tmp_path / "array.sh").write_text(run(slurm_command(source, store))[1])
    tasks = [
        subprocess.Popen(
            ["/bin/bash", str(tmp_path / "array.sh")],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert lasting_files(store) == lasting_files(whole)


def assert_a_killed_worker_is_made_up_for(arguments, store, whole):
    """Kill the first worker of a command that writes a store; the others make what a whole store has."""
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as parent:
        name = kill_first_worker(store, lambda owner: owner["pid"])
        output = parent.communicate(timeout=300)[1]
    assert parent.returncode == 0, output
    assert f"{name} died (exit code -9)" in output
    assert lasting_files(store).keys() == lasting_files(whole).keys()
    code, output = run([sys.executable, "-m", "pipeline", "verify", str(store)])
    assert code == 0, output


@pytest.mark.slow
def test_a_killed_process_of_two_is_made_up_for_by_the_other(source, whole, tmp_path):
    store = tmp_path / "store"
    arguments = command(source, store, "--devices", "cpu,cpu", "--batch-size", "1")
    assert_a_killed_worker_is_made_up_for(arguments, store, whole)


@pytest.mark.slow
def test_a_killed_ray_actor_of_two_is_made_up_for(source, whole, tmp_path):
    pytest.importorskip("ray")
    store = tmp_path / "store"
    arguments = command(source, store, "--engine", "ray", "--ray-actors", "2")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as driver:
        name = kill_first_worker(store, lambda owner: owner["pid"])
        output = driver.communicate(timeout=500)[1]
    assert driver.returncode == 0, output
    assert f"{name} died; the others take over its shard" in output
    assert lasting_files(store) == lasting_files(whole)


@pytest.fixture
def extension(source, whole, tmp_path):
    """A copy of the store to extend, the command that does so, and the store of one process that did so alone."""
    more = tmp_path / "more"
    more.mkdir()
    for number in range(30, 50):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(more / f"{number:02d}.png")

    def build(store, *options):
        options = ("--batch-size", "4", "--log-dir", str(tmp_path / "logs"), *options)
        return [sys.executable, "-m", "pipeline", "extend", str(store), str(more), *options]

    for name in ("alone", "store"):
        shutil.copytree(whole, tmp_path / name)
    code, output = run(build(tmp_path / "alone"))
    assert code == 0, output
    return tmp_path / "store", build, tmp_path / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["static", "slurm", "local", "ray"])
def test_every_engine_extends_a_store_to_the_same_bytes(extension, tmp_path, engine):
    store, build, alone = extension
    if engine == "slurm":
        array = tmp_path / "array.sh"
        array.write_text(run(build(store, "--engine", "slurm", "--slurm-tasks", "2"))[1])
        commands = [["/bin/bash", str(array)]] * 2
        environments = [
            {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"} for task in range(2)
        ]
    elif engine == "static":
        commands = [build(store, "--engine", "static")] * 2
        environments = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
    else:
        pytest.importorskip("ray" if engine == "ray" else "torch")
        more = ["--engine", "ray", "--ray-actors", "2"] if engine == "ray" else ["--devices", "cpu,cpu"]
        commands, environments = [build(store, *more)], [{}]
    workers = [
        subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    outputs = [worker.communicate(timeout=500)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), outputs
    assert lasting_files(store) == lasting_files(alone)
    code, output = run([sys.executable, "-m", "pipeline", "verify", str(store)])
    assert code == 0, output


@pytest.mark.slow
def test_a_killed_process_of_two_that_extend_is_made_up_for_by_the_other(extension):
    store, build, alone = extension
    assert_a_killed_worker_is_made_up_for(build(store, "--devices", "cpu,cpu"), store, alone)


def test_help_answers_without_torch():
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(['encode', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'timm', 'zarr', 'pyarrow', 'PIL'} & set(sys.modules)))"
    )
    began = time.process_time()
    code, output = run([sys.executable, "-c", program])
    assert code == 0
    assert output.splitlines()[-1] == "[]"
    assert time.process_time() - began < 1
