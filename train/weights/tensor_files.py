"""Write and read safetensors files so that a reader never meets half of one.

safetensors holds numbers and text only: loading a file cannot run code.
"""

from __future__ import annotations

import hashlib
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

from shards import UserError, replacing
from train.distributed import full_tensor

_HEADER = "rae-latents"
_DIGEST, _NO_DIGEST = "sha256", b"0" * 64
"""Entry of the file's metadata that holds its digest, and what stands there while the digest is computed."""

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


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    header: dict[str, Any] | None = None,
    *,
    write: bool = True,
    embed_digest: bool = False,
) -> str:
    """Write tensors, and JSON values in the file's header, under a temporary name that becomes `path` at the end.

    Each tensor comes to the host when its turn has come, so that memory holds one at a time. Where tensors are sharded,
    every process must call this with the same names.

    Args:
        path: the file; an older one is replaced in one step.
        tensors: tensors by name, on any device, whole or sharded.
        header: JSON values by name.
        write: whether this process writes; the others only help to gather.
        embed_digest: keep the file's digest in the file, for `require_intact`; for files that are passed on alone.

    Returns:
        SHA-256 of the file, in hexadecimal digits, computed while it is written; with `embed_digest`, of the file with
        zeros in the place of those digits. Empty on a process that does not write.
    """
    # Wide types first, so that each tensor begins at a multiple of its items' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    wholes = (full_tensor(tensor.detach()) for _, tensor in ordered)
    if not write:
        for _ in wholes:
            pass
        return ""
    start = _encoded_header(ordered, header or {}, embed_digest=embed_digest)
    with replacing(path) as file:
        file.write(start)
        digest = hashlib.sha256(start)
        _write_flushing(file, wholes, digest)
        if embed_digest:
            file.seek(start.index(_NO_DIGEST))
            file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def require_intact(path: Path) -> bool:
    """Compare a file with the digest it holds.

    Returns:
        Whether it holds one; files written before digests were kept do not.

    Raises:
        UserError: a byte of the file is not the one that was written.
    """
    with open_tensors(path) as (file, _):
        kept = (file.metadata() or {}).get(_DIGEST)
    if kept is None:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as content:
        start = content.read(8)
        start += content.read(int.from_bytes(start, "little"))
        digest.update(start.replace(kept.encode(), _NO_DIGEST, 1))
        while piece := content.read(_PIECE):
            digest.update(piece)
    if digest.hexdigest() != kept:
        raise UserError(
            f"{path} is damaged: its bytes are not those that were written; use another copy of it"
        )
    return True


def _encoded_header(
    tensors: list[tuple[str, Tensor]], header: dict[str, Any], *, embed_digest: bool
) -> bytes:
    """Return what precedes the tensors' bytes: its own length, then JSON.

    Source: github:huggingface/safetensors README, "Format".
    """
    # One entry: the file's own metadata may hold text alone.
    metadata = {_HEADER: json.dumps(header, sort_keys=True)} if header else {}
    if embed_digest:
        metadata = {_DIGEST: _NO_DIGEST.decode(), **metadata}
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
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


def _write_flushing(file: BinaryIO, tensors: Iterable[Tensor], digest: Any) -> None:
    """Append the tensors' bytes; the disk is kept at work meanwhile, so that little is left to flush at the end.

    Args:
        file: where to.
        tensors: whole tensors.
        digest: a hash, updated with the bytes in a thread of its own while they are written.
    """
    flushing: Future[None] | None = None
    written = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for tensor in tensors:
            # A view of the tensor itself where it is in host memory already.
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE].data
                hashing = pool.submit(digest.update, piece)
                written += file.write(piece)
                hashing.result()
                if written >= _FLUSH_EVERY and (flushing is None or flushing.done()):
                    flushing, written = pool.submit(os.fsync, file.fileno()), 0
    # The pool has waited for it; what it met is raised here.
    if flushing is not None:
        flushing.result()


@contextmanager
def open_tensors(path: Path, device: torch.device | str = "cpu") -> Iterator[tuple[Any, str]]:
    """Open a file for reading: `(file, header)`, where `file.get_tensor(name)` reads one tensor.

    The header is the JSON text of what `save_tensors` was given as one, "{}" in a file of another program.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file, (file.metadata() or {}).get(_HEADER, "{}")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
