"""Write and read safetensors files so that a reader never meets half of one.

safetensors holds numbers and text only: loading a file cannot run code.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards import UserError
from train.distributed import full_tensor

_HEADER = "rae-latents"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in the file. Source: safetensors' Dtype."""

_PIECE = 1 << 24
_FLUSH_EVERY = 1 << 26
"""Bytes written at a time, and after which a flush begins that was not under way."""


def save_tensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None, *, write: bool = True
) -> None:
    """Write tensors, and JSON values in the file's header, under a temporary name that becomes `path` at the end.

    Each tensor comes to the host when its turn has come, so that memory holds one at a time. Where tensors are sharded,
    every process must call this with the same names.

    Args:
        path: the file; an older one is replaced in one step.
        tensors: tensors by name, on any device, whole or sharded.
        header: JSON values by name.
        write: whether this process writes; the others only help to gather.
    """
    # Wide types first, so that each tensor begins at a multiple of its items' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    wholes = (full_tensor(tensor.detach()) for _, tensor in ordered)
    if not write:
        for _ in wholes:
            pass
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_encoded_header(ordered, header or {}))
            _write_flushing(file, wholes)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _encoded_header(tensors: list[tuple[str, Tensor]], header: dict[str, Any]) -> bytes:
    """What stands before the tensors' bytes: its own length, then JSON.

    Source: github:huggingface/safetensors README, "Format".
    """
    # One entry: the file's own metadata may hold text alone.
    entries: dict[str, Any] = {"__metadata__": {_HEADER: json.dumps(header, sort_keys=True)}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_flushing(file: BinaryIO, tensors: Iterable[Tensor]) -> None:
    """Append the tensors' bytes; the disk is kept at work meanwhile, so that little is left to flush at the end."""
    flushing: Future[None] | None = None
    written = 0
    with ThreadPoolExecutor(max_workers=1) as pool:
        for tensor in tensors:
            # A view of the tensor itself where it is in host memory already.
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _PIECE):
                written += file.write(data[start : start + _PIECE].data)
                if written >= _FLUSH_EVERY and (flushing is None or flushing.done()):
                    flushing, written = pool.submit(os.fsync, file.fileno()), 0
        file.flush()
    # The pool has waited for it; what it met is raised here.
    if flushing is not None:
        flushing.result()
    os.fsync(file.fileno())


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
