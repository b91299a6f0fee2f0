"""Checkpoints are there whole or not at all, and the newest is found by number."""

from __future__ import annotations

import json

import pytest
import torch

from shards.errors import UserError
from train.distributed import Team
from train.engine.checkpoint import (
    checkpoints,
    newest_of_all,
    open_part,
    prune,
    read_part,
    read_state,
    require_intact,
    require_intact_for_all,
    save_checkpoint,
    step_of,
)

PARTS = {"model": {"a": torch.arange(3.0)}, "optimizer": {"b": torch.ones(2, 2, dtype=torch.bfloat16)}}


def test_what_is_saved_is_read_back(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, {"window": [1.5]})
    assert (read_state(path).step, read_state(path).state) == (7, {"window": [1.5]})
    for part, tensors in PARTS.items():
        for name, tensor in tensors.items():
            assert torch.equal(read_part(path, part)[name], tensor)


def test_the_newest_has_the_highest_number(tmp_path):
    for step in (9, 100_000_000, 10):
        save_checkpoint(tmp_path, step, PARTS, {})
    assert [read_state(path).step for path in checkpoints(tmp_path)] == [9, 10, 100_000_000]
    prune(tmp_path, 1)
    assert [read_state(path).step for path in checkpoints(tmp_path)] == [100_000_000]


def test_a_write_that_fails_leaves_the_one_before_and_is_cleared_away_by_the_next(tmp_path):
    save_checkpoint(tmp_path, 1, PARTS, {})
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, 2, {**PARTS, "broken": {"a": "no tensor"}}, {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    save_checkpoint(tmp_path, 3, PARTS, {})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}


def test_a_process_that_does_not_write_helps_to_gather_whatever_its_disk_holds(tmp_path):
    asked = []

    class Asked(dict):
        def items(self):
            asked.append(len(self))
            return super().items()

    save_checkpoint(tmp_path, 1, PARTS, {})
    save_checkpoint(tmp_path, 1, {name: Asked(part) for name, part in PARTS.items()}, {}, write=False)
    assert asked == [1, 1]


def test_the_newest_checkpoint_is_the_one_all_processes_find(tmp_path):
    alone = Team()
    assert newest_of_all(tmp_path, alone) is None
    save_checkpoint(tmp_path, 9, PARTS, {})
    path = save_checkpoint(tmp_path, 10, PARTS, {})
    assert newest_of_all(tmp_path, alone) == path


def test_a_part_is_read_tensor_by_tensor(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    with open_part(path, "model") as stored:
        assert list(stored) == ["a"]
        assert "b" not in stored
        assert torch.equal(stored["a"], PARTS["model"]["a"])
    with pytest.raises(UserError, match=r"model\.safetensors"), open_part(path, "model") as stored:
        stored["b"]


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("position", [9, -1], ids=["header", "tensors"])
def test_one_flipped_bit_is_found_and_the_remedy_names_the_checkpoint_before(tmp_path, part, position):
    save_checkpoint(tmp_path, 1, PARTS, {})
    path = save_checkpoint(tmp_path, 2, PARTS, {})
    require_intact(path, read_state(path))
    flip_a_bit(path / f"{part}.safetensors", position)
    for check in (require_intact, lambda *found: require_intact_for_all(*found, Team())):
        with pytest.raises(UserError, match=rf"{part}\.safetensors is damaged.*continue from step-00000001"):
            check(path, read_state(path))


def test_a_checkpoint_from_before_digests_were_kept_is_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {"window": 3})
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state))
    assert read_state(path).state == {"window": 3}
    require_intact(path, read_state(path))


def test_a_folder_without_a_file_is_no_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    (tmp_path / "step-99999999999").mkdir()
    assert checkpoints(tmp_path) == [path]
    prune(tmp_path, 1)
    assert path.is_dir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: "", "Invalid JSON"),
        (lambda text: text[:50], "Invalid JSON"),
        (lambda text: "[" * 200_000, "recursion limit"),
        (lambda text: text.replace('"step": 2', '"step": "2"'), "step: "),
        (lambda text: text.replace('"step": 2', '"step": 9'), "says step 9"),
        (lambda text: text.replace('"files"', '"sizes"'), "files: "),
        (lambda text: text.replace("model.safetensors", "../model.safetensors"), "other files"),
    ],
    ids=["empty", "cut", "deep", "text", "other step", "missing key", "other folder"],
)
def test_a_state_file_that_does_not_fit_is_one_line(tmp_path, damage, named):
    save_checkpoint(tmp_path, 1, PARTS, {})
    path = save_checkpoint(tmp_path, 2, PARTS, {})
    file = path / "state.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError) as refused:
        read_state(path)
    assert str(file) in str(refused.value)
    assert named in str(refused.value)
    assert str(refused.value).endswith("continue from step-00000001")
    assert "\n" not in str(refused.value)


def test_a_checkpoint_without_its_state_file_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing; remove .* to begin again"):
        read_state(path)


def test_another_version_and_a_missing_file_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_state(path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": 0}))
    with pytest.raises(UserError, match="version 0"):
        read_state(path)


def test_a_checkpoint_that_is_not_confirmed_is_not_published(tmp_path):
    def refuse():
        raise UserError("taken over")

    save_checkpoint(tmp_path, 1, PARTS, {})
    with pytest.raises(UserError, match="taken over"):
        save_checkpoint(tmp_path, 2, PARTS, {}, confirm=refuse)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]
