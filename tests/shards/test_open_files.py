"""Readers keep as many shards open as the process's limit of files allows, and never need more."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from shards.reading.open_files import OpenFiles, file_limit
from shards.testing.contract import StoreKind, build_store

NUM_SHARDS = 70

READS_ALL = """
import os, resource, sys
import numpy as np
from shards.reading.store import open_store
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
store = open_store(sys.argv[1])
readers = [store.reader(view, name) for view, name in (("center", "tokens"), ("center", "image"), ("flip", "tokens"))]
out = [np.zeros((1, *reader.row_shape), reader.dtype) for reader in readers]
for row in store.valid_rows:
    for reader, one in zip(readers, out):
        reader.read([row], one)
opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
fields = ("center/tokens", "center/image", "flip/tokens")
print(*(sum(field in path for path in opened) for field in fields), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("many") / "store", StoreKind(num_images=NUM_SHARDS, num_shards=NUM_SHARDS)
    ).path


def read_all(path, soft, hard) -> list[int]:
    """Shards that each of three readers keeps open after reading every row, and the soft limit then."""
    command = [sys.executable, "-c", READS_ALL, str(path), str(soft), str(hard)]
    return [int(word) for word in subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()]


def test_a_low_soft_limit_is_raised_and_every_shard_stays_open(path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    *kept, soft = read_all(path, 128, hard)
    assert kept == [NUM_SHARDS] * 3
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_under_a_hard_limit_below_two_files_a_shard_every_row_is_read(path):
    *kept, soft = read_all(path, 64, 64)
    assert soft == 64
    assert kept == [64 // 4 // 3] * 3


def test_a_limit_that_is_high_enough_stays(path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 65_536:
        pytest.skip("the system lets this process have no higher limit")
    assert read_all(path, 65_537, hard)[-1] == 65_537


class Reader:
    """Keeps shards open, as `shards.reading.reader.StoredReader` does, without files."""

    def __init__(self, files):
        self.open = 0
        files.join(self)
        self.open = files.share()

    def keep(self, most):
        self.open = min(self.open, most)


def test_readers_that_come_take_from_the_others_and_what_those_that_go_had_is_free_again():
    files = OpenFiles()
    first = Reader(files)
    assert first.open == file_limit() // 4
    second, third = Reader(files), Reader(files)
    assert [reader.open for reader in (first, second, third)] == [file_limit() // 12] * 3
    del second, third
    assert files.share() == file_limit() // 4


def test_any_number_of_readers_has_one_shard_each():
    files = OpenFiles()
    readers = [Reader(files) for _ in range(file_limit() // 4 + 1)]
    assert {reader.open for reader in readers} == {1}
