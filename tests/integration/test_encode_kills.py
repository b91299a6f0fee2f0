"""`pipeline encode` killed with SIGKILL at seeded moments, and run again: the store equals an uninterrupted one.

A nursery process imports the program once and forks a child for each run, so that a run costs a moment. In the
child every call that changes the disk (write, flush, link, rename, remove) is counted, and SIGKILL is sent just
before a chosen one: this reaches every moment of planning, writing, committing and finishing.
"""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

NURSERY = """
import json, os, signal, sys
import pipeline.encode
from pipeline.cli import main

def count_calls(kill_at):
    seen = 0
    def counted(function):
        def call(*arguments, **keywords):
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    for name in ("writev", "fsync", "link", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: seen

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        with open(request["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        calls = count_calls(request["kill_at"])
        code = main(request["arguments"])
        with open(request["log"], "a") as log:
            log.write(f"\\ncalls {calls()}\\n")
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""

ARGUMENTS = [
    "--shards",
    "3",
    "--encoder",
    "test_vit",
    "--weights",
    "random:0",
    "--input-size",
    "32",
    "--encoder-args",
    "depth=1",
    "--batch-size",
    "4",
]


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
def encode(source, tmp_path_factory):
    """Runs `pipeline encode` in a fresh child; gives its exit code (minus the signal if killed) and its output."""
    log = tmp_path_factory.mktemp("log") / "output.txt"
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def run(store, kill_at=0):
            arguments = ["encode", str(source), "--out", str(store), *ARGUMENTS]
            request = {"arguments": arguments, "kill_at": kill_at, "log": str(log)}
            nursery.stdin.write(json.dumps(request) + "\n")
            nursery.stdin.flush()
            return json.loads(nursery.stdout.readline()), log.read_text()

        yield run
        nursery.stdin.close()


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
        if not name.startswith(("commits/", "manifest"))
    }


def kill_until_done(encode, store, moments):
    """Runs encode once for each moment, killed there if it gets so far, then to its end; gives the kills."""
    kills = 0
    for moment in moments:
        code, output = encode(store, moment)
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
    moments = [draw.randint(1, num_calls) for _ in range(3)]
    assert kill_until_done(encode, tmp_path / "store", moments) >= 1
    assert_equals(tmp_path / "store", whole_store)


@pytest.mark.slow
def test_fifty_kills_at_evenly_spread_moments_each_leave_a_store_that_continues(encode, whole, tmp_path):
    whole_store, num_calls = whole
    for number in range(50):
        store = tmp_path / f"store{number}"
        moment = 1 + number * num_calls // 50
        assert kill_until_done(encode, store, [moment]) == 1
        assert_equals(store, whole_store)
