"""`pipeline encode` killed, stopped, starved of disk or source, doubled; run again: the store is the uninterrupted one.

A nursery process imports the program once and forks a child for each run, so that a run costs a moment. In the
child every call that changes the disk (write, flush, link, rename, remove) is counted, and SIGKILL is sent just
before a chosen one: this reaches every moment of planning, writing, committing and finishing.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import TINY_ENCODER

from shards.integrity.verify import verify_store
from shards.reading.store import open_store

NURSERY = """
import errno, json, os, signal, sys, time
import pipeline.operations.encode
from pipeline.cli import main

CALLS = ("writev", "fsync", "link", "rename", "replace", "unlink", "rmdir", "mkdir")

def count_calls(request):
    seen = 0
    def counted(function):
        def call(*arguments, **keywords):
            nonlocal seen
            seen += 1
            if seen == request["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == request["stop_at"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            if request["full_from"] and seen >= request["full_from"] and function.__name__ == "writev":
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **keywords)
        return call
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: seen

def run(request):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    calls = count_calls(request)
    if request["hurry"]:  # leases of those who are stopped run out at once
        now, sleep = time.monotonic, time.sleep
        time.monotonic = lambda: now() * request["hurry"]
        time.sleep = lambda seconds: sleep(seconds / request["hurry"])
    try:
        code = main(request["arguments"])
    except SystemExit as exit:
        code = exit.code
    os.write(log, f"\\ncalls {calls()}\\n".encode())
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        status = os.waitpid(request["wait"], os.WUNTRACED)[1]
        answer = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    else:
        answer = os.fork()
        if answer == 0:
            run(request)
    print(json.dumps(answer), flush=True)
"""

ARGUMENTS = ["--shards", "3", *TINY_ENCODER, "--batch-size", "4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 20 photographs, one of them damaged."""
    root = tmp_path_factory.mktemp("source")
    for number in range(20):
        path = root / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    (root / "class0" / "06.png").write_bytes(b"not a picture")
    return root


@pytest.fixture(scope="module")
def grown(source, tmp_path_factory):
    """The source with 9 more photographs, some of a class that it had not."""
    root = tmp_path_factory.mktemp("grown") / "source"
    shutil.copytree(source, root)
    for number in range(20, 29):
        path = root / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    return root


class Run:
    """One `pipeline encode` in a process of its own."""

    def __init__(self, ask, log, pid):
        self.ask, self.log, self.pid = ask, log, pid

    def output(self):
        """What it has printed so far."""
        return self.log.read_text()

    def wait(self):
        """Its exit code, minus the signal that killed it, or "stopped"."""
        return self.ask({"wait": self.pid})


@pytest.fixture(scope="module")
def start(source, tmp_path_factory):
    """Starts `pipeline encode` of the source or another folder, or another command, in a fresh child of the nursery."""
    logs = tmp_path_factory.mktemp("logs")
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def ask(request):
            nursery.stdin.write(json.dumps(request) + "\n")
            nursery.stdin.flush()
            return json.loads(nursery.stdout.readline())

        def begin(store, *more, images=source, arguments=(), kill_at=0, stop_at=0, full_from=0, hurry=0):
            log = logs / f"{len(list(logs.iterdir()))}.txt"
            arguments = list(arguments) or ["encode", str(images), "--out", str(store), *ARGUMENTS, *more]
            log.touch()
            moments = {"kill_at": kill_at, "stop_at": stop_at, "full_from": full_from, "hurry": hurry}
            return Run(ask, log, ask({"arguments": arguments, "log": str(log), **moments}))

        yield begin
        nursery.stdin.close()


@pytest.fixture(scope="module")
def encode(start):
    """Runs `pipeline encode` to its end; gives its exit code and its output."""

    def run(store, *arguments, **settings):
        process = start(store, *arguments, **settings)
        return process.wait(), process.output()

    return run


@pytest.fixture(scope="module")
def whole(encode, tmp_path_factory):
    """The store of an uninterrupted run, and how many disk calls it took."""
    store = tmp_path_factory.mktemp("whole") / "store"
    code, output = encode(store)
    assert code == 0, output
    return store, int(output.rpartition("calls ")[2])


def lasting_files(store):
    """Content of every file that must not depend on interruptions; times and attempts are in commits and manifest."""
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith(("commits/", "manifest", "fields/"))
    }


def kill_until_done(encode, store, moments):
    """Runs encode once for each moment, killed there if it gets so far, then to its end; gives the kills."""
    kills = 0
    for moment in moments:
        code, output = encode(store, kill_at=moment)
        assert code in (0, -signal.SIGKILL), output
        kills += code != 0
    code, output = encode(store)
    assert code == 0, output
    assert "19 of 20 images in 3 shards, 1 unusable" in output
    return kills


def assert_equals(store, whole_store):
    """Compares all lasting files; temporaries of the killed runs are not the store's."""
    found = {name: content for name, content in lasting_files(store).items() if not name.endswith(".tmp")}
    expected = lasting_files(whole_store)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_and_continued_store_equals_an_uninterrupted_one(encode, whole, tmp_path, seed):
    whole_store, num_calls = whole
    draw = random.Random(seed)
    moments = [draw.randint(1, num_calls) for _ in range(2)]
    assert kill_until_done(encode, tmp_path / "store", moments) >= 1
    assert_equals(tmp_path / "store", whole_store)


@pytest.mark.parametrize(
    "share", [0.3, 0.9, *(pytest.param(n / 40, marks=pytest.mark.slow) for n in range(1, 40))]
)
def test_an_encoder_stopped_until_others_have_finished_notices_it_and_exits_well(
    start, encode, whole, tmp_path, share
):
    whole_store, num_calls = whole
    stopped = start(tmp_path / "store", stop_at=int(share * num_calls))
    assert stopped.wait() == "stopped"
    code, output = encode(tmp_path / "store", hurry=10_000)
    assert code == 0, output
    assert "19 of 20 images in 3 shards, 1 unusable" in output
    assert_equals(tmp_path / "store", whole_store)
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait() == 0, stopped.output()
    assert "Traceback" not in stopped.output()
    assert verify_store(tmp_path / "store") == []
    assert_equals(tmp_path / "store", whole_store)


def wait_for(condition, seconds=60):
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def commits(store):
    """Commit records of a store."""
    return list(store.glob("commits/*/*.json"))


def test_two_encoders_at_once_make_one_store(start, whole, tmp_path):
    store = tmp_path / "store"
    both = [start(store), start(store)]
    assert [run.wait() for run in both] == [0, 0], both[0].output() + both[1].output()
    assert_equals(store, whole[0])


def test_the_shards_of_a_killed_encoder_are_taken_over_by_a_living_one(start, whole, tmp_path):
    store = tmp_path / "store"
    doomed = start(store, kill_at=whole[1] // 2)
    wait_for(lambda: list(store.glob(".work/leases/shard-*.json")))
    helper = start(store)
    assert doomed.wait() == -signal.SIGKILL
    assert helper.wait() == 0, helper.output()
    assert_equals(store, whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly_and_says_how_to_continue(start, encode, whole, tmp_path, number):
    store = tmp_path / "store"
    run = start(store)
    wait_for(lambda: commits(store))
    os.kill(run.pid, number)
    if run.wait() != 0:  # it may have been quicker than the signal
        assert (
            run.output().splitlines()[-1].startswith("calls") or "run the same command again" in run.output()
        )
        assert "Traceback" not in run.output()
        assert not list(store.rglob("*.tmp"))
        assert not list(store.glob(".work/leases/*"))
    code, output = encode(store)
    assert code == 0, output
    assert_equals(store, whole[0])


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_a_full_disk_is_one_line_and_the_run_continues_once_there_is_space(encode, whole, tmp_path, part):
    store = tmp_path / "store"
    code, output = encode(store, full_from=int(whole[1] * part))
    if code != 0:  # late in the run nothing large is written any more
        assert code == 1
        last = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(last) == 1
        assert "No space left on device" in last[0]
        assert "run the same command again" in last[0]
        assert "Traceback" not in output
    code, output = encode(store)
    assert code == 0, output
    assert_equals(store, whole[0])


def test_a_source_that_vanishes_stops_the_run_and_continues_when_it_is_back(
    start, encode, source, whole, tmp_path
):
    images, store = tmp_path / "images", tmp_path / "store"
    shutil.copytree(source, images)
    run = start(store, "--batch-size", "1", images=images)
    wait_for(lambda: (store / "zarr.json").exists())
    images.rename(tmp_path / "away")
    assert run.wait() == 1
    assert "the source is gone" in run.output()
    assert "Traceback" not in run.output()
    (tmp_path / "away").rename(images)
    code, output = encode(store, "--batch-size", "1", images=images)
    assert code == 0, output
    assert open_store(store).manifest.num_valid == 19


@pytest.mark.slow
def test_fifty_kills_at_evenly_spread_moments_each_leave_a_store_that_continues(encode, whole, tmp_path):
    whole_store, num_calls = whole
    for number in range(50):
        store = tmp_path / f"store{number}"
        moment = 1 + number * num_calls // 50
        assert kill_until_done(encode, store, [moment]) == 1
        assert_equals(store, whole_store)


ADDITIONS = {
    "add-view": ["add-view", "STORE", "--views", "crop:1", "--batch-size", "4"],
    "add-field": [
        "add-field",
        "STORE",
        "--name",
        "other",
        *ARGUMENTS[2:4],
        "--weights",
        "random:1",
        *ARGUMENTS[6:],
    ],
    "derive": [
        "add-field",
        "STORE",
        "--name",
        "flat",
        "--compressor",
        "STORE/../compressor.safetensors",
        "--batch-size",
        "4",
    ],
    "extend": ["extend", "STORE", "GROWN", "--batch-size", "4", "--max-bad", "1"],
    "reshard": ["reshard", "STORE", "--out", "STORE/../new", "--shards", "2"],
    "subset": ["subset", "STORE", "--out", "STORE/../new", "--every", "2"],
}


KILLED = [
    pytest.param(
        name,
        seed,
        marks=() if name in ("add-view", "derive", "extend", "reshard") and not seed else pytest.mark.slow,
    )
    for name in ADDITIONS
    for seed in range(9)
]


@pytest.mark.parametrize(("name", "seed"), KILLED)
def test_what_is_done_to_a_finished_store_survives_kills_and_the_store_is_whole_at_every_moment(
    encode, whole, grown, tmp_path, make_compressor, name, seed
):
    def run(root, kill_at=0):
        places = {"STORE": str(root / "store"), "GROWN": str(grown)}
        arguments = [re.sub("STORE|GROWN", lambda m: places[m[0]], argument) for argument in ADDITIONS[name]]
        return encode(root / "store", arguments=arguments, kill_at=kill_at)

    shutil.copytree(whole[0], tmp_path / "one" / "store")
    shutil.copytree(whole[0], tmp_path / "other" / "store")
    for root in ("one", "other"):
        make_compressor(tmp_path / root / "compressor.safetensors", open_store(whole[0]))
    code, output = run(tmp_path / "one")
    assert code == 0, output
    num_calls = int(output.rpartition("calls ")[2])
    draw = random.Random(f"{name} {seed}")
    kills = 0
    for moment in (
        draw.randint(1, num_calls // 2),
        draw.randint(1, num_calls // 2),
        draw.randint(1, num_calls),
    ):
        code, output = run(tmp_path / "other", kill_at=moment)
        assert code in (0, -signal.SIGKILL), output
        kills += code != 0
        assert verify_store(tmp_path / "other" / "store") == []
    assert kills >= 2
    code, output = run(tmp_path / "other")
    assert code == 0, output
    for path in sorted((tmp_path / "one").glob("**/manifest.json")):
        found = tmp_path / "other" / path.relative_to(tmp_path / "one")
        assert verify_store(found.parent) == []
        assert_equals(found.parent, path.parent)
