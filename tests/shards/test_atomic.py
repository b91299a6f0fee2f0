"""Files appear whole or not at all, and the first publication stays."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from blake3 import blake3

from shards.storage.atomic import (
    is_temporary,
    publish_once,
    replacing,
    temporary_path,
    write_temporary,
)
from shards.storage.location import begin_object, publish_bytes, replace_atomically


def test_the_first_publication_wins_and_the_loser_is_dropped(tmp_path):
    final = tmp_path / "folder" / "object"
    one, other = write_temporary(final, b"one"), write_temporary(final, b"other")
    assert publish_once(other, final)
    assert not publish_once(one, final)
    assert final.read_bytes() == b"other"
    assert [p.name for p in final.parent.iterdir()] == ["object"]


def test_exactly_one_of_many_at_once_wins(tmp_path):
    final = tmp_path / "object"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: publish_bytes(final, bytes([i]) * 1000), range(32)))
    assert won.count(True) == 1
    assert final.read_bytes() == bytes([won.index(True)]) * 1000
    assert [p.name for p in tmp_path.iterdir()] == ["object"]


def test_replacing_replaces(tmp_path):
    replace_atomically(tmp_path / "object", b"one")
    replace_atomically(tmp_path / "object", b"other")
    assert (tmp_path / "object").read_bytes() == b"other"
    assert [p.name for p in tmp_path.iterdir()] == ["object"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    replace_atomically(tmp_path / "object", b"one")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_atomically(tmp_path / "object", b"other")
    assert (tmp_path / "object").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["object"]


def test_a_file_that_is_written_in_pieces_appears_whole_or_not_at_all(tmp_path):
    with replacing(tmp_path / "folder" / "object") as file:
        file.write(b"one")
        assert not (tmp_path / "folder" / "object").exists()

    def broken_off():
        with replacing(tmp_path / "folder" / "object") as file:
            file.write(b"half of the oth")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_off()
    assert (tmp_path / "folder" / "object").read_bytes() == b"one"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["object"]


def test_temporary_names_are_different_and_recognised(tmp_path):
    one, other = temporary_path(tmp_path / "00001.tar"), temporary_path(tmp_path / "00001.tar")
    assert one != other
    assert is_temporary(one)
    assert not any(is_temporary(tmp_path / name) for name in ("00001.tar", ".hidden", ".a.tmp", "a.0123.tmp"))


@pytest.mark.parametrize(("algorithm", "expected"), [("sha256", hashlib.sha256), ("blake3", blake3)])
def test_output_of_any_cut_has_the_same_bytes_and_digest(tmp_path, algorithm, expected):
    content = os.urandom(3_000_000)
    digests = set()
    with ThreadPoolExecutor(1) as pool:
        for cut in (1_000_003, 3_000_000, 1_000):
            file = begin_object(tmp_path / "object", pool, algorithm)
            parts = [content[i : i + cut] for i in range(0, len(content), cut)]
            file.write(parts[: len(parts) // 2])
            file.write([b"", *parts[len(parts) // 2 :]])
            assert file.position == len(content)
            digests.add(file.finish())
            assert file.publish()
            assert (tmp_path / "object").read_bytes() == content
            (tmp_path / "object").unlink()
            file.discard()
    assert digests == {expected(content).hexdigest()}
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_a_little_at_a_time_gets_everything(tmp_path, monkeypatch):
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: writev(fd, [views[0][:5]]))
    with ThreadPoolExecutor(1) as pool:
        file = begin_object(tmp_path / "object", pool, "blake3")
        file.write([b"hello, ", b"world, ", b"in pieces"])
        file.finish()
        file.publish()
    assert (tmp_path / "object").read_bytes() == b"hello, world, in pieces"
