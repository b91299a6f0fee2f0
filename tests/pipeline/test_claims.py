"""Leases and claims: who works on what, when an owner counts as dead, and what is set aside."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.encode.claims import Claims, Failures, Task
from pipeline.encode.leases import Leases, Owner


def owner(name):
    """This process under a name."""
    return Owner.this_process(name)


def elsewhere(store, name, beat=0):
    """A lease as another machine would have written it."""
    folder = store / ".work" / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"owner": {"host": "other", "pid": 1, "born": "1", "name": "far"}, "token": "t", "beat": beat}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def test_a_lease_is_held_by_one_and_free_again_when_given_back(tmp_path):
    with Leases(tmp_path, owner("one")) as one, Leases(tmp_path, owner("two")) as two:
        assert one.take("a")
        assert not two.take("a")
        assert two.take("b")
        one.release("a")
        assert two.take("a")
    assert not list((tmp_path / ".work" / "leases").iterdir())


def test_the_lease_of_a_dead_process_of_this_host_is_taken_at_once(tmp_path):
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, os, signal; from pathlib import Path; from pipeline.encode.leases import Leases, Owner\n"
            "leases = Leases(Path(sys.argv[1]), Owner.this_process('child')); leases.__enter__(); leases.take('a')\n"
            "os.kill(os.getpid(), signal.SIGKILL)",
            str(tmp_path),
        ],
        check=False,
    )
    assert child.returncode == -9
    with Leases(tmp_path, owner("heir")) as heir:
        assert heir.take("a")


def test_a_lease_of_another_host_is_taken_only_after_it_has_been_still_for_long(tmp_path):
    path = elsewhere(tmp_path, "a")
    with Leases(tmp_path, owner("onlooker"), patience=0.3) as onlooker:
        assert not onlooker.take("a")
        time.sleep(0.2)
        elsewhere(tmp_path, "a", beat=1)
        assert not onlooker.take("a")
        time.sleep(0.2)
        assert not onlooker.take("a"), "a beat was seen only 0.2 s ago"
        time.sleep(0.2)
        assert onlooker.take("a")
        assert json.loads(path.read_text())["owner"]["name"] == "onlooker"


def beat_of(path):
    """The beat of a lease, once it is not just being rewritten."""
    while True:
        try:
            return json.loads(path.read_text())["beat"]
        except ValueError:
            time.sleep(0.001)


def test_a_held_lease_beats_and_a_stolen_one_is_left_to_the_thief(tmp_path):
    with Leases(tmp_path, owner("victim"), patience=0.12) as victim:
        assert victim.take("a")
        path = tmp_path / ".work" / "leases" / "a.json"
        before = beat_of(path)
        time.sleep(0.2)
        assert beat_of(path) > before
        elsewhere(tmp_path, "a", beat=7)
    assert beat_of(path) == 7


@pytest.fixture
def store(tmp_path):
    """Six shards in two views; the set holds what is pending."""
    return tmp_path, [(view, shard) for shard in range(6) for view in ("center", "flip")]


def claims_of(path, pending, leases, rank=0, world_size=1, attempts=2):
    """Claims over a list of pending pairs."""
    failures = Failures(path, attempts)
    return Claims(lambda: list(pending), leases, failures, rank=rank, world_size=world_size), failures


def test_each_worker_begins_with_its_share_and_then_helps_the_others(store):
    path, pending = store
    with Leases(path, owner("w")) as leases:
        claims, _ = claims_of(path, pending, leases, rank=1, world_size=3)
        taken = [claims.next().shard for _ in range(6)]
        assert taken == [1, 4, 2, 5, 0, 3]
        assert claims.next() is None
        assert not claims.finished()


def test_a_task_holds_the_views_that_are_missing(store):
    path, pending = store
    pending[:] = [("flip", 3), ("center", 5), ("flip", 5)]
    with Leases(path, owner("w")) as leases:
        claims, _ = claims_of(path, pending, leases)
        assert [claims.next(), claims.next()] == [Task(3, ("flip",)), Task(5, ("center", "flip"))]
        pending.clear()
        claims.give_back()
        assert claims.finished()


def test_two_workers_never_hold_the_same_shard(store):
    path, pending = store
    with Leases(path, owner("one")) as one, Leases(path, owner("two")) as two:
        first, _ = claims_of(path, pending, one, rank=0, world_size=2)
        second, _ = claims_of(path, pending, two, rank=1, world_size=2)
        taken = [claims.next().shard for _ in range(3) for claims in (first, second)]
        assert sorted(taken) == [0, 1, 2, 3, 4, 5]


def test_a_shard_that_fails_again_and_again_is_parked_and_the_others_go_on(store):
    path, pending = store
    pending[:] = [("center", 0), ("center", 1)]
    with Leases(path, owner("w")) as leases:
        claims, failures = claims_of(path, pending, leases)
        first, task = claims.next(), claims.next()
        assert (first.shard, task.shard) == (0, 1)
        claims.failed(first, "reason 0")
        claims.failed(claims.next(), "reason 1")
        assert failures.parked() == {0: "reason 1"}
        pending.remove(("center", 1))
        claims.done(task)
        assert claims.finished(), "a parked shard keeps nobody waiting"
        failures.clear()
        assert not claims.finished()


def test_a_worker_tries_what_it_has_failed_with_after_everything_else(store):
    path, pending = store
    with Leases(path, owner("w")) as leases:
        claims, _ = claims_of(path, pending, leases, rank=1, world_size=3)
        claims.failed(claims.next(), "reason")
        assert [claims.next().shard for _ in range(6)] == [4, 2, 5, 0, 3, 1]


def test_a_beat_that_the_disk_does_not_take_is_missed_and_the_next_one_gets_through(tmp_path, monkeypatch):
    write, refused = Path.write_bytes, []

    def write_later(path, content):
        if path.name == "a.json" and len(refused) < 2:
            refused.append(path)
            raise OSError(116, "Stale file handle")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_later)
    with Leases(tmp_path, owner("w"), patience=0.12) as leases:
        assert leases.take("a")
        path = tmp_path / ".work" / "leases" / "a.json"
        deadline = time.monotonic() + 20
        while beat_of(path) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(refused) == 2
        assert beat_of(path) > 2


def test_owners_are_told_apart_by_process_and_birth():
    assert not owner("me").known_dead()
    assert Owner(host=owner("me").host, pid=os.getpid(), born="0", name="earlier").known_dead()
    assert not Owner(host="other", pid=1, born="0", name="far").known_dead()
