"""Folders and servers behind one protocol: names, walks, sizes and reads, and whatever others do there meanwhile."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shards.storage.location import (
    as_location,
    children,
    object_names,
    object_sizes,
    object_version,
    open_object,
    storage_of,
)


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_files_are_named_in_order_and_folders_are_not(tmp_path):
    make(tmp_path, "b", "a/c/0", "a/c.json", "a/.0.json.tmp", ".hidden/d", "a-b/e")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    names = [".hidden/d", "a-b/e", "a/.0.json.tmp", "a/c.json", "a/c/0", "b"]
    assert object_names(tmp_path) == names
    assert object_names(tmp_path, "a") == ["a/.0.json.tmp", "a/c.json", "a/c/0"]
    assert object_names(tmp_path, "a/c") == ["a/c/0"]


def test_names_do_not_depend_on_how_the_folder_is_called(tmp_path, monkeypatch):
    make(tmp_path, "a/b")
    monkeypatch.chdir(tmp_path)
    here = type(tmp_path)(".")
    assert object_names(here) == object_names(here, "a") == object_names(tmp_path) == ["a/b"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    make(tmp_path, "file")
    assert object_names(tmp_path / "missing") == object_names(tmp_path, "missing") == []
    assert object_names(tmp_path, "file") == []


def test_links_to_files_are_named_and_links_to_folders_neither_named_nor_followed(tmp_path):
    make(tmp_path, "store/real/a", "elsewhere/b")
    for link, target in (
        ("file", tmp_path / "elsewhere/b"),
        ("folder", tmp_path / "elsewhere"),
        ("up", tmp_path),
        ("broken", tmp_path / "missing"),
        ("loop", tmp_path / "store/loop"),
    ):
        (tmp_path / "store" / link).symlink_to(target)
    assert object_names(tmp_path / "store") == ["broken", "file", "loop", "real/a"]
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert object_names(tmp_path / "link") == ["b"]


def test_a_folder_that_goes_during_the_look_is_passed_over(tmp_path, monkeypatch):
    make(tmp_path, "a/b/0", "a/c/0", "d/0")
    scandir = os.scandir

    def slow(path):
        if str(path).rstrip("/") == str(tmp_path / "a/b"):
            shutil.rmtree(tmp_path / "a/b")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    assert object_names(tmp_path) == ["a/c/0", "d/0"]


def test_a_look_at_a_folder_asks_nothing_of_its_files(tmp_path, monkeypatch):
    make(tmp_path, *(f"commits/center/{number:05d}.json" for number in range(50)))
    asked = []
    for name in ("stat", "lstat"):
        ask = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, ask=ask, **k: (asked.append(path), ask(path, *a, **k))[1]
        )
    assert len(object_names(tmp_path, "commits")) == 50
    assert asked == []


def test_children_are_files_and_folders_by_what_links_lead_to_and_nothing_else(tmp_path):
    make(tmp_path, "b", "a/c", "elsewhere/d")
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "folder").symlink_to("elsewhere")
    (tmp_path / "dead").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert children(tmp_path) == (["b", "link"], ["a", "elsewhere", "folder"])
    assert children(tmp_path / "missing") == children(tmp_path / "b") == ([], [])


def test_the_version_of_a_file_is_another_once_it_is_written_anew(tmp_path):
    make(tmp_path, "a")
    os.utime(tmp_path / "a", ns=(0, 1))
    assert object_version(tmp_path / "a") == (1, "1")
    os.utime(tmp_path / "a", ns=(0, 2))
    assert object_version(tmp_path / "a") == (1, "2")


@pytest.fixture(params=["folder", "server"])
def root(request, tmp_path):
    """An empty folder, and one of a server that is memory of this process."""
    return as_location(tmp_path if request.param == "folder" else f"memory://{tmp_path.name}")


@pytest.mark.parametrize("read_ahead", [True, False])
def test_several_threads_read_one_object_at_once(root, read_ahead):
    content = np.random.default_rng(0).bytes(20 << 20)
    storage_of(root).replace(root / "object", content)
    with open_object(root / "object", read_ahead=read_ahead) as source, ThreadPoolExecutor(8) as pool:

        def is_right(offset):
            return source.read(1000, offset) == content[offset : offset + 1000]

        assert all(pool.map(is_right, np.random.default_rng(1).integers(0, len(content), 400).tolist()))
        assert source.read(10, len(content) + 5) == b""


def test_a_walk_meets_every_file_by_name(root):
    for name in ("b/2.png", "b/10.png", "a.txt", "b.d/x"):
        storage_of(root).replace(root / name, name.encode())
    met = [entry for entry in storage_of(root).walk(root) if not entry.is_folder]
    assert ["/".join(entry.parts) for entry in met] == ["a.txt", "b/10.png", "b/2.png", "b.d/x"]
    assert [entry.size() for entry in met] == [5, 8, 7, 5]
    assert [entry.path for entry in met] == [str(root / "/".join(entry.parts)) for entry in met]
    assert not any(entry.is_outside for entry in met)


def test_a_walk_of_a_folder_names_links_that_lead_out_or_nowhere_and_enters_no_circle(tmp_path):
    make(tmp_path, "root/a/1", "out/2", "root/.hidden/3")
    for link, target in (("circle", "root"), ("a/out", "out"), ("nowhere", "missing")):
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "root" / "pipe")
    met = {"/".join(entry.parts): entry for entry in storage_of(tmp_path).walk(tmp_path / "root")}
    assert list(met) == [".hidden", "a", "a/1", "a/out", "a/out/2", "nowhere", "pipe"]
    assert {name for name, entry in met.items() if entry.is_folder} == {"a", "a/out"}
    assert {name for name, entry in met.items() if entry.is_outside} == {"a/out", "nowhere"}
    assert (met["a/1"].size(), met["nowhere"].size(), met["pipe"].size()) == (1, 0, None)
    assert (met["a/1"].head(4), met["pipe"].head(4)) == (b"x", b"")


def test_what_is_no_file_has_no_size_as_an_object(tmp_path):
    make(tmp_path, "file", "folder/inside")
    os.mkfifo(tmp_path / "pipe")
    assert object_sizes(tmp_path, ["file", "folder", "pipe", "missing"]) == {"file": 1}
