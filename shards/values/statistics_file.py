"""Files of latent statistics: `mean` and `var` [D, h, w], in PyTorch's, numpy's or safetensors' form.

The published files are `.pt`, their mean may be absent or None, and their numbers are float32. A `.pt` file is read
here without torch: it is a zip archive of a pickle, which names the tensors, and of their bytes. The pickle may name
tensors, their storages and plain values; anything else is refused, so that nothing in a file can run code.

Source: github:bytetriper/RAE src/stage1/rae.py and src/calculate_stat.py at a4d18c4; the archive: "Serialization
semantics" in PyTorch's notes.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UsageError

MOST_BYTES = 1 << 30
"""Bytes of a file, and of an array in it, beyond which it is not read; statistics take some megabytes."""

_STORAGES: dict[object, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
}
"""Types of torch's storages by class name; numpy has no bfloat16, whose bits are widened after reading."""

_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RecursionError),
    *(
        MemoryError,
        struct.error,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ),
    *(zlib.error, SyntaxError, tokenize.TokenError),
)
"""What reading a file that is not as it must be can raise."""


@dataclass(frozen=True)
class StatisticsFile:
    """Latent statistics from a file, finite, float64."""

    mean: NDArray[np.float64] | None
    """[D, h, w], or None where the file has none."""
    variance: NDArray[np.float64]
    """[D, h, w], not negative."""
    sha256: str
    """Digest of the file, in hexadecimal digits."""


def read_statistics_file(path: Path) -> StatisticsFile:
    """Return statistics from a file of any of the three forms; nothing in it can run code.

    Args:
        path: `.pt`, `.npz` or `.safetensors` with `var` and, if any, `mean`.

    Raises:
        UsageError: it is not such a file, or its numbers cannot be statistics.
    """
    content = _content(path)
    try:
        values = _reader(path)(content)
        arrays = {name: np.array(value, np.float64) for name, value in values.items() if value is not None}
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} cannot be read as {path.suffix} without running code: {reason}; give a file of plain arrays"
        ) from error
    if "var" not in arrays or set(arrays) - {"mean", "var"}:
        raise UsageError(
            f"a statistics file must hold 'var' and, if any, 'mean'; "
            f"{path} holds {', '.join(map(str, values)) or 'nothing'}"
        )
    mean, variance = arrays.get("mean"), arrays["var"]
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape != variance.shape:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items())
            raise UsageError(f"statistics must be [D, h, w], mean and var alike; {path} holds {shapes}")
        if not np.isfinite(array).all():
            raise UsageError(f"statistics must be finite numbers; {name} in {path} is not, name another file")
    if (variance < 0).any():
        raise UsageError(f"a variance cannot be negative; the smallest in {path} is {variance.min():g}")
    return StatisticsFile(mean, variance, hashlib.sha256(content).hexdigest())


def _reader(path: Path) -> Callable[[bytes], Mapping[str, Any]]:
    readers = {".pt": _read_pt, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UsageError(f"statistics are kept in files named {', '.join(readers)}, not {path.name}")
    return readers[path.suffix]


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UsageError(f"statistics must be a readable file; there is none at {path}; name another")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"statistics must be a readable file; {path} is not: {error.strerror}; name another"
        ) from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"{path} is larger than {MOST_BYTES:,} bytes, which no statistics are; name another")
    return content


def _read_npz(content: bytes) -> Mapping[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            _require_size(entry.file_size)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _read_safetensors(content: bytes) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_pt(content: bytes) -> Mapping[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise ValueError("it is not a file that torch.save writes")
        values = _TensorUnpickler(archive, pickled[0].removesuffix("data.pkl")).load()
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} instead of a dictionary")  # noqa: TRY004
    return values


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors as arrays, and plain values; refuses every other class or function by name."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(_entry(archive, f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"it names a {kind!r}, which is no array")
        data = _entry(self._archive, f"{self._folder}data/{key}")
        numbers: NDArray[Any] = np.frombuffer(data, _STORAGES[storage])
        if len(numbers) != count:
            raise ValueError(f"an array of {count} numbers is stored in {len(data)} bytes")
        if storage == "BFloat16Storage":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers


def _tensor(
    storage: NDArray[Any], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> NDArray[Any]:
    """Return the part of a storage that a tensor is, as torch._utils._rebuild_tensor_v2 makes it."""
    if len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
        raise ValueError(f"a tensor of shape {shape}, strides {stride} and offset {offset} cannot be")
    count = math.prod(list(shape))
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise ValueError(f"a tensor of shape {list(shape)} does not be in {len(storage)} stored numbers")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    _require_size(entry.file_size)
    return archive.read(entry)


def _require_size(nbytes: int) -> None:
    if nbytes > MOST_BYTES:
        raise ValueError(f"an array in it has {nbytes:,} bytes, which no statistics have")
