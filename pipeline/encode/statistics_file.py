"""Files of latent statistics: ``mean`` and ``var`` [D, h, w], in PyTorch's, numpy's or safetensors' form.

The published files are ``.pt``, their mean may be absent or None, and their numbers are float32; ours keep float64.

Source: github:bytetriper/RAE src/stage1/rae.py and src/calculate_stat.py at a4d18c4.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from shards import GivenStatistics, Statistics, UsageError, replace_atomically

_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


def read_statistics(path: Path, shape: tuple[int, int, int]) -> GivenStatistics:
    """Statistics from a file of any of the three forms; nothing in it can run code.

    Args:
        path: ``.pt``, ``.npz`` or ``.safetensors`` with ``var`` and, if any, ``mean``.
        shape: (D, h, w) of the tokens they are for.

    Raises:
        UsageError: If it is not such a file, or its numbers cannot be statistics of these tokens.
    """
    content = _content(path)
    try:
        values = _reader(path)(content)
        arrays = {name: _array(value) for name, value in values.items() if value is not None}
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
    mean = arrays.get("mean", np.zeros(shape))
    for name, array in (("mean", mean), ("var", arrays["var"])):
        if array.shape != shape:
            raise UsageError(
                f"statistics must be of the tokens, [D, h, w] = {list(shape)}; {name} in {path} is "
                f"{list(array.shape)}: these are another encoder's or another size's"
            )
        if not np.isfinite(array).all():
            raise UsageError(f"statistics must be finite numbers; {name} in {path} is not, name another file")
    if (arrays["var"] < 0).any():
        raise UsageError(f"a variance cannot be negative; the smallest in {path} is {arrays['var'].min():g}")
    return GivenStatistics(
        Statistics(mean, arrays["var"], count=0), path.name, hashlib.sha256(content).hexdigest()
    )


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write ``mean`` and ``var``: float32 tensors as published where the name ends in ``.pt``, else float64.

    Raises:
        UsageError: If the name ends in none of the three, or the file cannot be written.
    """
    arrays = {"mean": statistics.mean, "var": statistics.variance}
    buffer = io.BytesIO()
    _reader(path)
    if path.suffix == ".pt":
        torch.save({name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}, buffer)
    elif path.suffix == ".npz":
        np.savez(buffer, mean=statistics.mean, var=statistics.variance)
    else:
        buffer.write(save_safetensors(arrays))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"--out must be a file that can be written, {path} is not: {error}; name another"
        ) from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"statistics must be a readable file; {path} is not: {error.strerror}; name another"
        ) from error


def _reader(path: Path) -> Callable[[bytes], Mapping[str, Any]]:
    readers = {".pt": _read_pt, ".npz": _read_npz, ".safetensors": load_safetensors}
    if path.suffix not in readers:
        raise UsageError(f"statistics are kept in files named {', '.join(readers)}, not {path.name}")
    return readers[path.suffix]


def _read_pt(content: bytes) -> Mapping[str, Any]:
    values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} instead of a dictionary")  # noqa: TRY004
    return values


def _read_npz(content: bytes) -> Mapping[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return dict(archive)


def _array(value: Any) -> NDArray[np.float64]:
    return np.asarray(value.double() if isinstance(value, torch.Tensor) else value, np.float64)
