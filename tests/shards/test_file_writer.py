"""A file has the bytes that were written, whatever part of them went past the page cache."""

import errno
import fcntl
import mmap
import os

import pytest

from shards.storage.file_writer import PAGE, FileWriter

PIECE = 1 << 20


@pytest.fixture
def memory():
    """Random bytes that begin at a page."""
    mapped = mmap.mmap(-1, 3 * PIECE)
    mapped.write(os.urandom(3 * PIECE))
    return memoryview(mapped)


def write(path, pieces):
    """Writes the pieces one after another; says which went past the cache."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    writer, direct = FileWriter(descriptor, past_cache=True), []
    for piece in pieces:
        writer.write([memoryview(part) for part in piece])
        direct.append(writer.is_direct)
    os.close(descriptor)
    return direct


def has_direct_writes(folder):
    descriptor = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_what_fits_goes_past_the_cache_and_the_rest_through_it(tmp_path, memory):
    pieces = [
        [memory[:PIECE]],
        [memory[PIECE : PIECE + PAGE], memory[: 2 * PIECE]],
        [memory[:PAGE]],  # too little to be worth it
        [b"the index"],
        [memory[PIECE:]],  # its place is no page's
    ]
    direct = write(tmp_path / "object", pieces)
    assert (tmp_path / "object").read_bytes() == b"".join(part for piece in pieces for part in piece)
    if has_direct_writes(tmp_path):
        assert direct == [True, True, False, False, False]


def test_memory_that_begins_within_a_page_goes_through_the_cache(tmp_path, memory):
    assert write(tmp_path / "object", [[memory[64 : 64 + PIECE]]]) == [False]
    assert (tmp_path / "object").read_bytes() == memory[64 : 64 + PIECE]


def test_a_disk_with_larger_pages_and_a_file_system_without_direct_writes_get_everything(
    tmp_path, memory, monkeypatch
):
    writev, change, wanted = os.writev, fcntl.fcntl, []

    def refuse_direct(descriptor, views):
        if change(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return writev(descriptor, views)

    def refuse_flag(descriptor, command, flags=0):
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            wanted.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return change(descriptor, command, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", refuse_direct)
        assert write(tmp_path / "one", [[memory], [memory]]) == [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse_flag)
        assert write(tmp_path / "other", [[memory], [memory]]) == [False, False]
    assert len(wanted) == 1, "asked once"
    for name in ("one", "other"):
        assert (tmp_path / name).read_bytes() == bytes(memory) * 2


def test_a_short_write_goes_on_where_it_ended(tmp_path, memory, monkeypatch):
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: writev(fd, [views[0][: PAGE * 3]]))
    write(tmp_path / "object", [[memory[:PIECE], memory[PIECE : 2 * PIECE]]])
    assert (tmp_path / "object").read_bytes() == memory[: 2 * PIECE]
