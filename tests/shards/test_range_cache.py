"""A cache that several processes share gives right bytes or none, and stays below its limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import shards.storage.range_cache
from shards.errors import UsageError
from shards.metadata.layout import field_of
from shards.reading.reader import StoredReader
from shards.reading.store import open_store
from shards.storage.range_cache import RESTING_SECONDS, RangeCache, range_cache
from shards.testing.contract import StoreKind, build_store, expected_row, flip_bit, same_bits

DIGEST = "ab" * 32


def entry(number, nbytes=1000):
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def held(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_added_is_read_back_by_another_process_s_cache(tmp_path):
    RangeCache(tmp_path, 10**6).add(DIGEST, 7, entry(1))
    out = np.zeros(1000, np.uint8)
    other = RangeCache(tmp_path, 10**6)
    assert other.read_into(DIGEST, 7, out)
    assert same_bits(out, entry(1))
    assert not other.read_into(DIGEST, 8, out)
    assert not other.read_into("cd" * 32, 7, out)
    assert not other.read_into(DIGEST, 7, out[:999])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty"])
def test_a_damaged_entry_is_not_given_and_goes(tmp_path, damage):
    cache = RangeCache(tmp_path, 10**6)
    cache.add(DIGEST, 0, entry(1))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content = path.read_bytes()
    if damage == "flipped":
        flip_bit(path, 4321)
    else:
        path.write_bytes({"truncated": content[:-1], "longer": content + b"x", "empty": b""}[damage])
    assert not cache.read_into(DIGEST, 0, np.zeros(1000, np.uint8))
    assert not path.exists()


def test_a_full_cache_gives_up_what_was_read_longest_ago(tmp_path):
    cache = RangeCache(tmp_path, 40_000)
    for number in range(30):
        cache.add(DIGEST, number, entry(number))
    rested = time.time() - RESTING_SECONDS - 1000
    for path in tmp_path.rglob("0-*"):
        os.utime(path, (rested - 60, rested - 60))
    for number in range(1, 30):
        (path,) = tmp_path.rglob(f"{number}-*")
        os.utime(path, (rested + number, rested + number))
    assert cache.read_into(DIGEST, 0, np.zeros(1000, np.uint8))  # read again: the newest now
    for number in range(100, 120):
        RangeCache(tmp_path, 40_000).add(DIGEST, number, entry(number))
    assert held(tmp_path) <= 40_000
    names = {int(path.name.partition("-")[0]) for path in tmp_path.rglob("*-*")}
    gone = set(range(30)) - names
    assert gone
    assert 0 not in gone
    assert gone == set(range(1, len(gone) + 1))


def test_a_full_cache_of_what_is_in_use_takes_nothing_new(tmp_path):
    cache = RangeCache(tmp_path, 64_000)
    for number in range(100):
        cache.add(DIGEST, number, entry(number))
    kept = {path.name for path in tmp_path.rglob("*-*")}
    assert 50 < len(kept) < 64
    out = np.zeros(1000, np.uint8)
    assert all(cache.read_into(DIGEST, number, out) for number in range(len(kept)))
    assert held(tmp_path) <= 64_000


class Clock:
    """The module's clock, which goes when it is told to."""

    def __init__(self):
        self.passed = 0.0
        self.started = time.time()

    def time(self):
        return self.started + self.passed

    def monotonic(self):
        return self.passed


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shards.storage.range_cache, "time", clock)
    return clock


@pytest.fixture
def looks(monkeypatch):
    """The times at which a cache has looked at all its entries."""
    looks = []
    files = RangeCache.files
    monkeypatch.setattr(RangeCache, "files", lambda cache: (looks.append(1), files(cache))[1])
    return looks


def filled(folder, clock):
    """A full cache; its entries are a minute apart, number 0 being the oldest."""
    cache = RangeCache(folder, 40_000)
    for number in range(60):
        cache.add(DIGEST, number, entry(number))
    for path in folder.rglob("*-*"):
        read = clock.started - 3600 + 60 * int(path.name.partition("-")[0])
        os.utime(path, (read, read))
    cache = RangeCache(folder, 40_000)
    cache.add(DIGEST, 99, entry(99))
    assert not list(folder.rglob("99-*"))
    return cache


def test_a_full_cache_is_looked_at_again_when_its_oldest_entry_has_rested(tmp_path, clock, looks):
    cache = filled(tmp_path, clock)
    looks.clear()
    for number in range(100, 350):  # the oldest was read an hour ago: five hours are left, less these minutes
        clock.passed += 61
        cache.add(DIGEST, number, entry(number))
    assert looks == []
    assert not list(tmp_path.rglob("[123]??-*"))
    clock.passed = RESTING_SECONDS - 3600 - 1
    cache.add(DIGEST, 400, entry(400))
    assert looks == []
    clock.passed += 62
    cache.add(DIGEST, 401, entry(401))
    assert looks == [1]
    assert list(tmp_path.rglob("401-*"))
    assert not list(tmp_path.rglob("0-*"))


def test_a_full_cache_that_was_emptied_takes_in_what_comes(tmp_path, clock):
    cache = filled(tmp_path, clock)
    for inside in tmp_path.iterdir():
        shutil.rmtree(inside)
    clock.passed += 61
    cache.add(DIGEST, 100, entry(100))
    assert cache.read_into(DIGEST, 100, np.zeros(1000, np.uint8))


def test_an_entry_that_is_read_again_is_not_given_up_when_it_would_have_rested(tmp_path, clock):
    cache = filled(tmp_path, clock)
    clock.passed = RESTING_SECONDS - 3600
    assert cache.read_into(DIGEST, 0, np.zeros(1000, np.uint8))
    clock.passed += 61
    cache.add(DIGEST, 100, entry(100))
    assert list(tmp_path.rglob("0-*"))
    assert not list(tmp_path.rglob("1-1000"))


def test_several_processes_together_stay_below_the_limit(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from shards.storage.range_cache import RangeCache\n"
        "cache = RangeCache(Path(sys.argv[1]), 400_000)\n"
        "for number in range(600):\n"
        "    cache.add('ab' * 32, int(sys.argv[2]) * 1000 + number, np.full(1000, number % 256, np.uint8))\n"
    )
    commands = [[sys.executable, "-c", program, str(tmp_path), str(number)] for number in range(4)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0] * 4
    assert 300_000 < held(tmp_path) <= 400_000


def test_a_killed_process_poisons_nothing_and_locks_nobody_out(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from shards.storage.range_cache import RangeCache\n"
        "cache = RangeCache(Path(sys.argv[1]), 10**9)\n"
        "number = 0\n"
        "while True:\n"
        "    cache.add('ab' * 32, number, np.random.default_rng(number).integers(0, 256, 200_000, np.uint8))\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    cache = RangeCache(tmp_path, 10**9)
    out = np.zeros(200_000, np.uint8)
    hits = [
        cache.read_into(DIGEST, number, out) and same_bits(out, entry(number, 200_000))
        for number in range(25)
    ]
    assert all(hits[:20])
    for leftover in tmp_path.rglob(".*.tmp"):
        os.utime(leftover, (1, 1))
    cache.add(DIGEST, 999, entry(1))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_settings_that_make_no_sense_are_refused(tmp_path):
    assert range_cache(None, None) is None
    with pytest.raises(UsageError, match="belong together"):
        range_cache(tmp_path, None)
    with pytest.raises(UsageError, match="must be at least 1"):
        range_cache(tmp_path, 0)
    build_store(tmp_path / "store", StoreKind(num_images=2, num_shards=1))
    with pytest.raises(UsageError, match="--cache is for stores on a server"):
        open_store(tmp_path / "store", RangeCache(tmp_path / "cache", 10**6))


@pytest.mark.parametrize(
    "kind", [StoreKind(), StoreKind(compression="zstd"), StoreKind(format="webdataset")], ids=str
)
def test_the_second_epoch_comes_from_the_cache(tmp_path, web_server, kind):
    build_store(tmp_path / "store", kind)
    cache = RangeCache(tmp_path / "cache", 10**7)
    for epoch in range(3):
        store = open_store(f"{web_server.url}/store", cache)
        reader = store.reader("center", "tokens")
        rows = store.valid_rows
        out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
        reader.read(rows[:1], out)
        web_server.requests.clear()
        reader.read(rows, out)
        field = field_of(store.recipe, "center", "tokens")
        assert same_bits(out, np.stack([expected_row(field, row) for row in rows.tolist()]))
        asked = [
            path for path, first, last in web_server.requests if last - first + 1 >= field.row_nbytes // 2
        ]
        if epoch:
            indices = kind.num_shards - 1 if kind.format == "zarr" else 0
            assert len(web_server.requests) <= indices
        else:
            assert asked
        if epoch == 1:  # damaged entries are fetched again
            for path in (tmp_path / "cache").rglob("*-*"):
                flip_bit(path, 5)
            reader.read(rows, out)
            assert same_bits(out, np.stack([expected_row(field, row) for row in rows.tolist()]))


def test_wrong_bytes_from_a_server_are_not_kept(tmp_path, web_server):
    store = build_store(tmp_path / "store", StoreKind())
    record = next(o for o in store.manifest.objects if o.path == "center/tokens/c/0/0/0")
    flip_bit(tmp_path / "store" / record.path, 3)
    cache = RangeCache(tmp_path / "cache", 10**7)
    remote = open_store(f"{web_server.url}/store", cache)
    out = np.zeros((1, 6, 5), np.float16)
    remote.reader("center", "tokens", verify="never").read([0], out)
    flip_bit(tmp_path / "store" / record.path, 3)
    remote.reader("center", "tokens", verify="always").read([0], out)
    assert isinstance(store.reader("center", "tokens"), StoredReader)
