"""Latent statistics from a file for the tokens of a store, and to a file.

Published files hold float32; those written here, except `.pt`, float64.
"""

import io
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as save_safetensors

from shards import GivenStatistics, Statistics, UsageError, read_statistics_file, replace_atomically


def read_statistics(path: Path, shape: tuple[int, int, int]) -> GivenStatistics:
    """Return statistics from a file, as `read_statistics_file` reads it; an absent mean is zero.

    Args:
        path: ``.pt``, ``.npz`` or ``.safetensors`` with ``var`` and, if any, ``mean``.
        shape: (D, h, w) of the tokens they are for.

    Raises:
        UsageError: If it is not such a file, or its numbers cannot be statistics of these tokens.
    """
    found = read_statistics_file(path)
    if found.variance.shape != shape:
        raise UsageError(
            f"statistics must be of the tokens, [D, h, w] = {list(shape)}; var in {path} is "
            f"{list(found.variance.shape)}: these are another encoder's or another size's"
        )
    mean = np.zeros(shape) if found.mean is None else found.mean
    return GivenStatistics(Statistics(mean, found.variance, count=0), path.name, found.sha256)


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write ``mean`` and ``var``: float32 tensors as published where the name ends in ``.pt``, else float64.

    Raises:
        UsageError: If the name ends in none of the three, or the file cannot be written.
    """
    arrays = {"mean": statistics.mean, "var": statistics.variance}
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save({name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}, buffer)
    elif path.suffix == ".npz":
        np.savez(buffer, mean=statistics.mean, var=statistics.variance)
    elif path.suffix == ".safetensors":
        buffer.write(save_safetensors(arrays))
    else:
        raise UsageError(f"statistics are kept in files named .pt, .npz, .safetensors, not {path.name}")
    try:
        replace_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"--out must be a file that can be written, {path} is not: {error}; name another"
        ) from error
