"""Write and read safetensors files so that a reader never meets half of one.

safetensors holds numbers and text only: loading a file cannot run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.errors import UserError

_HEADER = "rae-latents"


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None) -> None:
    """Write tensors, and JSON values in the file's header, under a temporary name that becomes `path` at the end.

    Args:
        path: the file; an older one is replaced in one step.
        tensors: tensors by name, on any device.
        header: JSON values by name.
    """
    # One entry, because safetensors writes several in no particular order, and the same state is to be the same file.
    texts = {_HEADER: json.dumps(header or {}, sort_keys=True)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=texts)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def open_tensors(path: Path, device: torch.device | str = "cpu") -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file for reading: `(file, header)`, where `file.get_tensor(name)` reads one tensor.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file, json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole safetensors file of ours: {error}") from error


def sync(path: Path) -> None:
    """Make a file, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
