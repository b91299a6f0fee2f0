"""Names of a folder's objects: all of them, cheaply, and whatever others do there meanwhile."""

from __future__ import annotations

import os
import shutil

from shards.storage.location import children, object_names, object_version


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
