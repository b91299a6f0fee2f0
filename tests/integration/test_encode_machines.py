"""`pipeline encode` on a file system that is really full, from a source nobody may write to, and on two hosts.

Each test runs the command inside a mount or UTS namespace of its own, and is skipped where that is not allowed.
"""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import TINY_ENCODER

from shards.integrity.verify import verify_store
from shards.reading.store import open_store

HOST = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
"""Runs a command as if on a machine of its own: mounts, name, process ids and network."""


def allowed():
    """Whether this process may make such a machine, and mount there."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    script = "mount -t tmpfs tmpfs /mnt && hostname other"
    return subprocess.run([*HOST, "sh", "-c", script], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not allowed(), reason="mounting in a namespace needs Linux and root")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 40 photographs."""
    root = tmp_path_factory.mktemp("source")
    for number in range(40):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(root / f"{number:02d}.png")
    return root


def command(source, store, *more):
    """`python -m pipeline encode` with the arguments of these tests."""
    return [
        sys.executable,
        "-m",
        "pipeline",
        "encode",
        str(source),
        "--out",
        str(store),
        *TINY_ENCODER,
        *more,
    ]


def run(arguments):
    """Runs a command to its end; gives its exit code and what it printed."""
    done = subprocess.run(arguments, text=True, capture_output=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


def tokens_of(store):
    """Every stored row by view and key, whatever the shards."""
    found = {}
    for view in store.views:
        reader = store.reader(view, "tokens")
        out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
        reader.read(store.valid_rows, out)
        found |= {(view, key): row.tobytes() for key, row in zip(store.plan.keys, out, strict=True)}
    return found


@needs_namespaces
def test_a_full_file_system_stops_the_run_and_nothing_is_lost_once_there_is_space(source, tmp_path):
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    arguments = ("--shards", "8", "--batch-size", "5", "--image-size", "128", "--log-dir", str(log))
    inside = " ".join(command(source, disk / "store", *arguments))
    # Room for some of 40 pictures of 49,152 bytes; then the disk grows. Copies are carried out of the namespace.
    script = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} || exit 99; {inside}; echo code $?; "
        f"cp -r {disk}/store {tmp_path}/stopped; mount -o remount,size=64m {disk}; {inside}; echo code $?; "
        f"cp -r {disk}/store {tmp_path}/store"
    )
    code, output = run([*HOST, "sh", "-c", script])
    assert code == 0, output
    codes = [line for line in output.splitlines() if line.startswith("code ")]
    assert codes == ["code 1", "code 0"], output
    stopped = output.partition("code 1")[0]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "No space left on device" in errors[0]
    assert "run the same command again" in errors[0]
    assert "Traceback" not in stopped
    assert not list((tmp_path / "stopped").rglob("*.tmp"))
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    assert verify_store(tmp_path / "store") == []
    for record in (tmp_path / "stopped").glob(
        "commits/*/*.json"
    ):  # what was finished before was not made again
        assert (
            record.read_bytes()
            == (tmp_path / "store" / record.relative_to(tmp_path / "stopped")).read_bytes()
        )
    assert run(command(source, tmp_path / "whole", *arguments))[0] == 0
    assert tokens_of(open_store(tmp_path / "store")) == tokens_of(open_store(tmp_path / "whole"))


@needs_namespaces
def test_a_source_that_cannot_be_written_to_is_enough(source, tmp_path):
    inside = " ".join(command(source, tmp_path / "store", "--shards", "2"))
    script = f"mount --bind {source} {source} && mount -o remount,bind,ro {source} && ! touch {source}/x && {inside}"
    code, output = run([*HOST, "sh", "-c", script])
    assert code == 0, output
    assert open_store(tmp_path / "store").manifest.num_valid == 40


@pytest.mark.slow
@needs_namespaces
def test_a_source_unmounted_in_mid_run_stops_it_and_the_run_continues(source, tmp_path):
    inside = " ".join(command(tmp_path / "images", tmp_path / "store", "--shards", "8", "--batch-size", "1"))
    script = (
        f"mkdir {tmp_path}/images; mount --bind {source} {tmp_path}/images; {inside} & "
        f"while [ -z \"$(find {tmp_path}/store/commits -name '*.json' 2>/dev/null)\" ]; do sleep 0.01; done; "
        f"umount --lazy {tmp_path}/images; rmdir {tmp_path}/images; wait $!; echo code $?; "
        f"mkdir {tmp_path}/images; mount --bind {source} {tmp_path}/images; {inside}; echo code $?"
    )
    code, output = run([*HOST, "sh", "-c", script])
    assert code == 0, output
    assert [line for line in output.splitlines() if line.startswith("code ")] == ["code 1", "code 0"], output
    assert "the source is gone" in output
    assert "Traceback" not in output
    assert open_store(tmp_path / "store").manifest.num_valid == 40


def on_host(name, arguments):
    """Starts a command on a machine of another name."""
    script = f"hostname {name} && exec {' '.join(arguments)}"
    return subprocess.Popen([*HOST, "sh", "-c", script], stderr=subprocess.PIPE, text=True)


def held_by(store, host):
    """Shards whose lease a host holds."""
    held = []
    for lease in store.glob(".work/leases/shard-*.json"):
        try:
            if json.loads(lease.read_text())["owner"]["host"].startswith(f"{host}/"):
                held.append(lease.stem)
        except (FileNotFoundError, ValueError):
            continue
    return held


@pytest.mark.slow
@needs_namespaces
def test_the_shards_of_a_host_that_dies_are_taken_over_by_another_host(source, tmp_path):
    store = tmp_path / "store"
    arguments = command(source, store, "--shards", "8", "--batch-size", "1")
    doomed = on_host("one", arguments)
    deadline = time.monotonic() + 120
    while not held_by(store, "one"):
        assert time.monotonic() < deadline
        assert doomed.poll() is None
        time.sleep(0.005)
    doomed.kill()  # the whole host: every process in its namespace dies
    doomed.communicate()
    orphaned = held_by(store, "one")
    helper = on_host("two", arguments)
    output = helper.communicate(timeout=200)[1]
    assert helper.returncode == 0, output
    assert orphaned, "the host died between two shards"
    # Nobody can ask a dead host whether its process lives: its lease is respected until it has grown old.
    written = {path.stem: path.stat().st_mtime_ns for path in store.glob("commits/center/*.json")}
    last = max(written, key=lambda shard: written[shard])
    assert f"shard-{last}" in orphaned
    assert run(command(source, tmp_path / "whole", "--shards", "8", "--batch-size", "1"))[0] == 0
    assert tokens_of(open_store(store)) == tokens_of(open_store(tmp_path / "whole"))


@pytest.mark.slow
@needs_namespaces
def test_two_hosts_share_one_store(source, tmp_path):
    store = tmp_path / "store"
    arguments = command(source, store, "--shards", "20", "--batch-size", "1")
    hosts = [on_host(name, arguments) for name in ("one", "two")]
    seen = set()
    while any(host.poll() is None for host in hosts):
        seen |= {name for name in ("one", "two") if held_by(store, name)}
        time.sleep(0.005)
    outputs = [host.communicate()[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert seen == {"one", "two"}
    assert verify_store(store) == []
    assert open_store(store).manifest.num_valid == 40
