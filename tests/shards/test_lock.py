"""One process at a time writes into a folder; a lock whose process is gone is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from shards import FolderLock, UsageError, UserError
from shards.storage import lock

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom shards import FolderLock\n"
    "with FolderLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holding(tmp_path):
    """A process that holds the lock on the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "held\n"
        yield held
        held.kill()


def test_a_second_process_is_refused_with_host_and_number(holding, tmp_path):
    with (
        pytest.raises(UserError, match=f"is being written by process {holding.pid} on "),
        FolderLock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_whose_process_was_killed_is_taken_at_once(holding, tmp_path, kill):
    holding.send_signal(kill)
    holding.wait()
    with FolderLock(tmp_path) as held:
        assert held.is_held()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_is_free_again_afterwards_also_when_the_command_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
        raise ZeroDivisionError
    assert (tmp_path / ".lock").read_bytes() == b""
    with FolderLock(tmp_path):
        pass


def test_without_flock_a_running_process_is_told_from_a_later_one_of_the_same_number(
    holding, tmp_path, monkeypatch
):
    def not_offered(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", not_offered)
    with pytest.raises(UserError, match=f"process {holding.pid}"), FolderLock(tmp_path):
        pass
    holder = json.loads((tmp_path / ".lock").read_text())
    holding.kill()
    holding.wait()
    (tmp_path / ".lock").write_text(json.dumps({**holder, "pid": os.getpid()}))
    with FolderLock(tmp_path):
        pass


def test_another_hosts_lock_is_stale_when_nobody_touches_it(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    elsewhere = json.dumps(asdict(replace(lock.this_process(), host="elsewhere")))
    path.write_text(elsewhere)
    waits = []

    def touched(seconds):
        waits.append(seconds)
        os.utime(path, ns=(0, len(waits)))

    monkeypatch.setattr(lock.time, "sleep", touched)
    with pytest.raises(UserError, match="on elsewhere"), FolderLock(tmp_path):
        pass
    monkeypatch.setattr(lock.time, "sleep", waits.append)
    with FolderLock(tmp_path) as held:
        # That host wakes up and writes its name again.
        path.write_text(elsewhere)
        assert not held.is_held()
    assert path.read_text() == elsewhere
    assert sum(waits[1:]) == lock.BEAT * lock.STALE_AFTER


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 9000, b'{"host": 3}'])
def test_a_lock_file_that_holds_no_process_is_free(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with FolderLock(tmp_path) as held:
        assert held.is_held()


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(UsageError, match="is a link"), FolderLock(tmp_path):
        pass
    assert target.read_text() == "mine"
