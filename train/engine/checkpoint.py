"""Checkpoints: the state to resume, in a directory that is there whole or not at all.

    RUN/checkpoints/step-00001000/
        state.json            version, step and the run's small state; sizes of the files beside it
        model.safetensors     one file a part; whole tensors, whatever the number of processes

The directory is written under a hidden name, flushed, and renamed at the end, so a killed write leaves the previous
checkpoint as the newest. Nothing in it depends on how many processes wrote it. Every process reads it, so RUN must lie
where all of them see it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from shards import UserError
from train.distributed import Team
from train.weights.tensor_files import open_tensors, save_tensors, sync

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")

Parts = dict[str, dict[str, Tensor]]
"""Tensors by part and name."""


def save_checkpoint(
    directory: Path, step: int, parts: Parts, state: dict[str, Any], *, write: bool = True
) -> Path:
    """Write `directory`/step-N, straight from the tensors; every process must call this, and only one may write.

    Args:
        directory: RUN/checkpoints.
        step: optimizer steps taken; there must be no checkpoint of it.
        parts: tensors, whole or sharded; each part becomes a file of whole ones.
        state: JSON values.
        write: whether this process writes; the others only help to gather.

    Returns:
        The checkpoint's directory.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    if write:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
    for name, tensors in parts.items():
        save_tensors(temporary / f"{name}.safetensors", tensors, write=write)
    if not write:
        return final
    sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    content = {"version": VERSION, "step": step, "files": sizes, "state": state}
    (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    sync(temporary / "state.json")
    sync(temporary)
    temporary.rename(final)
    sync(directory)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest_of_all(directory: Path, team: Team) -> Path | None:
    """The newest checkpoint of a run, None where there is none; every process must ask.

    Args:
        directory: RUN/checkpoints.
        team: the processes.

    Raises:
        UserError: the processes find different ones, because they do not look at one disk.
    """
    names = team.gather(next((path.name for path in reversed(checkpoints(directory))), None))
    for rank, name in enumerate(names):
        if name != names[0]:
            raise UserError(
                f"every process must see the same {directory}, but the newest checkpoint there is "
                f"{names[0] or 'none'} to process 0 and {name or 'none'} to process {rank}; "
                "put --out on a disk that all processes share"
            )
    return None if names[0] is None else directory / names[0]


def step_of(checkpoint: Path) -> int:
    """The optimizer steps taken before a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(directory)[:-keep]:
        shutil.rmtree(path)


def read_state(path: Path) -> tuple[int, dict[str, Any]]:
    """Step and JSON state of a checkpoint, after comparing its files' sizes with what was written.

    Raises:
        UserError: it is of another version, or a file is missing or has another size.
    """
    content = json.loads((path / "state.json").read_text())
    if content["version"] != VERSION:
        raise UserError(
            f"{path} is a checkpoint of version {content['version']}; this program reads {VERSION}"
        )
    for name, size in content["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise UserError(
                f"{file} should have {size} bytes and has {found}; remove {path} to continue from the one before"
            )
    return content["step"], content["state"]


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, in host memory.

    Raises:
        UserError: the part's file is missing or broken.
    """
    with open_part(path, part) as stored:
        return dict(stored)


@contextmanager
def open_part(path: Path, part: str) -> Iterator[Mapping[str, Tensor]]:
    """Open one part of a checkpoint: its tensors by name, each read into host memory whenever it is asked for.

    Raises:
        UserError: the part's file is missing or broken, or a tensor that is asked for is not in it.
    """
    with open_tensors(path / f"{part}.safetensors") as (file, _):
        yield _StoredTensors(file)


class _StoredTensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file; keeps none of them."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
