"""Links in stores and run folders of strangers: nothing is written, removed or read through them unasked."""

import dataclasses
import os
import shutil

import pytest
import torch

from shards import StoreWriter, UsageError, open_store, verify_store
from shards.testing.contract import StoreKind, build_store
from shards.writing.revisions import begin_revision
from train.engine.checkpoint import checkpoints, prune, save_checkpoint

PRECIOUS = ("00000.json", "notes.txt", "shard-00000.json", "0/zarr.json")


@pytest.fixture
def precious(tmp_path):
    """A folder of somebody's, with names that a store has too."""
    folder = tmp_path / "precious"
    for name in PRECIOUS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def untouched(folder):
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return set(found) == set(PRECIOUS) and all(path.read_text() == "mine" for path in found.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "store"
    build_store(path, StoreKind(num_images=6, num_shards=2, views=("center",)))
    return path


@pytest.fixture
def store(tmp_path, built):
    return open_store(shutil.copytree(built, tmp_path / "store"))


def outside(path, folder):
    """Move what is at a path of a store elsewhere, and put a link in its place."""
    path.rename(folder / path.name)
    path.symlink_to(folder / path.name)


@pytest.mark.parametrize(
    "link", [".work", ".work/leases", ".work/failures", "revisions", "fields", "moments", "commits"]
)
@pytest.mark.parametrize("command", ["clean", "withdraw", "add a view", "continue"])
def test_nothing_is_written_or_removed_through_a_link(store, precious, pipeline, link, command):
    path = store.path / link
    if path.exists():
        path.rename(store.path.parent / "aside")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(precious)
    if command == "clean":
        code, _, err = pipeline("clean", store.path, "--wait", 0)
    elif command == "withdraw":
        code, _, err = pipeline("verify", store.path, "--withdraw", "--wait", 0)
    else:
        write = {
            "continue": lambda: StoreWriter.create_or_continue(store.path, store.recipe, store.plan),
            "add a view": lambda: begin_revision(
                store.path, dataclasses.replace(store.recipe, views=("center", "flip"))
            ),
        }[command]
        with pytest.raises(UsageError) as refused:
            write()
        code, err = refused.value.exit_code, f"error: {refused.value}"
    assert code == 2
    assert f"error: {path} is a link; nothing is written or removed through it" in err
    assert untouched(precious)
    assert path.is_symlink()


def test_cleaning_removes_only_names_of_our_own(store, pipeline):
    for name in (".work/leases/diary.txt", ".work/failures/diary.txt", "moments/diary.txt"):
        (store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.path / name).write_text("mine")
    (store.path / ".work/leases/shard-00000.json").write_text("{}")
    assert pipeline("clean", store.path, "--wait", 0)[0] == 0
    assert {path.name for path in store.path.rglob("diary.txt")} == {"diary.txt"}
    assert not (store.path / ".work/leases/shard-00000.json").exists()
    assert sum(1 for _ in store.path.rglob("diary.txt")) == 3


@pytest.mark.parametrize(
    "name", ["center", "center/tokens/c/1", "plan.parquet", "manifest.json", "center/tokens/c/0/0/0"]
)
def test_a_store_behind_links_is_read_when_that_is_asked_for(store, tmp_path, name):
    (tmp_path / "disk").mkdir()
    outside(store.path / name, tmp_path / "disk")
    with pytest.raises(UsageError, match="--follow-links"):
        open_store(store.path)
    assert verify_store(store.path)
    assert open_store(store.path, follow_links=True).valid_rows.tolist() == store.valid_rows.tolist()
    assert verify_store(store.path, follow_links=True) == []


def test_the_folder_of_a_store_may_be_a_link_itself(store, tmp_path):
    (tmp_path / "link").symlink_to(store.path)
    assert open_store(tmp_path / "link").id == store.id
    assert verify_store(tmp_path / "link") == []


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "plan.parquet", "commits/center/00000.json"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
@pytest.mark.parametrize("follow", [(), ("--follow-links",)])
def test_pipes_and_devices_are_neither_read_nor_waited_for(store, pipeline, name, kind, follow):
    path = store.path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    for command in ("verify", "inspect"):
        code, _, err = pipeline(command, store.path, *follow)
        assert code in (1, 2)
        assert "error: " in err
        assert "Traceback" not in err


def test_pruning_leaves_links_and_files_of_others(tmp_path, precious):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, {"model": {"a": torch.zeros(2)}}, {})
    first = tmp_path / "checkpoints/step-00000001"
    (first / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints/step-00000000").symlink_to(precious)
    prune(tmp_path / "checkpoints", 1)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    assert [path.read_text() for path in (tmp_path / "checkpoints").rglob("notes.txt")] == ["mine"]
    assert untouched(precious)
