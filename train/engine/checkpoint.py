"""Checkpoints: the state to resume, in a directory that is there whole or not at all.

    RUN/checkpoints/step-00001000/
        state.json            version, step and the run's small state; size and SHA-256 of each file beside it
        model.safetensors     one file a part; whole tensors, whatever the number of processes

The directory is written under a hidden name, flushed, and renamed at the end, so a killed write leaves the previous
checkpoint as the newest. Nothing in it depends on how many processes wrote it. Every process reads it, so RUN must be
where all of them see it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shards import UserError, fsync_dir, read_document, replace_atomically
from train.distributed import Team
from train.weights.tensor_files import open_tensors, save_tensors

VERSION = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_UNFINISHED = re.compile(r"\.step-\d{8,}\.tmp", re.ASCII)
_PART = re.compile(r"[\w.-]+\.safetensors")
_OWN = re.compile(r"state\.json|[\w.-]+\.safetensors|\..+\.[0-9a-f]{32}\.tmp")
"""Names of files in a checkpoint's folder, finished or not."""

Parts = dict[str, dict[str, Tensor]]
"""Tensors by part and name."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What state.json holds."""

    version: int
    step: int
    """Optimizer steps taken."""
    files: dict[str, int]
    """Bytes of each file beside it."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digest of each file beside it; empty in checkpoints written before digests were kept."""
    state: dict[str, Any]
    """The run's small state, JSON values."""


def save_checkpoint(
    directory: Path,
    step: int,
    parts: Parts,
    state: dict[str, Any],
    *,
    write: bool = True,
    confirm: Callable[[], None] = lambda: None,
) -> Path:
    """Write `directory`/step-N, straight from the tensors; every process must call this, and only one may write.

    Args:
        directory: RUN/checkpoints.
        step: optimizer steps taken; there must be no checkpoint of it.
        parts: tensors, whole or sharded; each part becomes a file of whole ones.
        state: JSON values.
        write: whether this process writes; the others only help to gather.
        confirm: called by every process once the files are written; raises where they must not be published.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: what `confirm` raises; the checkpoint is then not published.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    if write:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*.tmp"):
            if _UNFINISHED.fullmatch(leftover.name):
                _remove(leftover)
        temporary.mkdir(exist_ok=True)
    digests = {
        f"{name}.safetensors": save_tensors(temporary / f"{name}.safetensors", tensors, write=write)
        for name, tensors in parts.items()
    }
    if write:
        content = {
            "version": VERSION,
            "step": step,
            "files": {name: (temporary / name).stat().st_size for name in sorted(digests)},
            "sha256": dict(sorted(digests.items())),
            "state": state,
        }
        replace_atomically(temporary / STATE, f"{json.dumps(content, indent=2)}\n".encode())
    confirm()
    if write:
        temporary.rename(final)
        fsync_dir(directory)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; a folder that holds nothing is none."""
    named = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if _own_files(path)), key=step_of)


def _own_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint's folder that a checkpoint may have; none of what is behind a link."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return []
    return [path for path in checkpoint.iterdir() if _OWN.fullmatch(path.name)]


def _remove(checkpoint: Path) -> None:
    """Remove the folder of a checkpoint, but for files of others and a link."""
    for path in _own_files(checkpoint):
        path.unlink()
    with suppress(OSError):  # not empty, or a link
        checkpoint.rmdir()


def newest_of_all(directory: Path, team: Team) -> Path | None:
    """Return the newest checkpoint of a run, None where there is none; every process must call this.

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
    """Return the optimizer steps taken before a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(directory)[:-keep]:
        # Under the name of an unfinished one first, so that a kill leaves no half of a checkpoint.
        hidden = path.with_name(f".{path.name}.tmp")
        _remove(path if hidden.exists() else path.rename(hidden))


def read_state(path: Path) -> CheckpointState:
    """Read a checkpoint's state.json, and compare its files' sizes with what was written.

    Raises:
        UserError: it is of another version or step, or a file is missing, has another size or is not valid.
    """
    file = path / STATE
    if not file.is_file():
        raise UserError(f"{file} is missing; {remedy(path)}")
    found = read_document(file.read_bytes(), CheckpointState, name=file, remedy=remedy(path))
    if found.version != VERSION:
        raise UserError(f"{path} is a checkpoint of version {found.version}; this program reads {VERSION}")
    if found.step != step_of(path):
        raise UserError(f"{file} says step {found.step}; {remedy(path)}")
    if any(_PART.fullmatch(name) is None for name in found.files) or (
        found.sha256 and found.sha256.keys() != found.files.keys()
    ):
        raise UserError(f"{file} names other files than a checkpoint has; {remedy(path)}")
    for name, size in found.files.items():
        part = path / name
        nbytes = part.stat().st_size if part.is_file() else None
        if nbytes != size:
            raise UserError(f"{part} should have {size} bytes and has {nbytes}; {remedy(path)}")
    return found


def require_intact(path: Path, state: CheckpointState, names: list[str] | None = None) -> None:
    """Compare files of a checkpoint with the digests in its state.json.

    Args:
        path: the checkpoint.
        state: what `read_state` returned.
        names: the files to read; None: all of them.

    Raises:
        UserError: a byte of a file is not the one that was written.
    """
    for name in sorted(state.sha256) if names is None else names:
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != state.sha256[name]:
            raise UserError(
                f"{path / name} is damaged: its bytes are not those that were written; {remedy(path)}"
            )


def require_intact_for_all(path: Path, state: CheckpointState, team: Team) -> None:
    """Check as `require_intact` does, the files divided among the processes; every process must call this."""
    own = sorted(state.sha256)[team.rank :: team.world_size]
    fault = None
    try:
        require_intact(path, state, own)
    except UserError as error:
        fault = str(error)
    faults = [fault for fault in team.gather(fault) if fault is not None]
    if faults:
        raise UserError(faults[0])


def remedy(path: Path) -> str:
    """Return the remedy for a damaged checkpoint."""
    before = [other.name for other in checkpoints(path.parent) if step_of(other) < step_of(path)]
    return f"remove {path} to " + (f"continue from {before[-1]}" if before else "begin again")


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a checkpoint, in host memory.

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
