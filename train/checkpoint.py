"""Checkpoints: the state to resume, in a directory that is there whole or not at all.

    RUN/checkpoints/step-00001000/
        state.json            version, step and the run's small state; sizes of the files beside it
        model.safetensors     one file a part; whole tensors, whatever the number of processes

The directory is written under a hidden name, flushed, and renamed at the end, so a killed write leaves the previous
checkpoint as the newest. Nothing in it depends on how many processes wrote it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from shards.errors import UserError
from train.tensor_files import open_tensors, save_tensors, sync

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
        step: optimizer steps taken.
        parts: tensors, whole or sharded; each part becomes a file of whole ones.
        state: JSON values.
        write: whether this process writes; the others only help to gather.

    Returns:
        The checkpoint's directory.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    if final.exists():
        return final  # continued and stopped again at once: the state at a step is always the same
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
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


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
    with open_tensors(path / f"{part}.safetensors") as (file, _):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
