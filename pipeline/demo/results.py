"""Reads what the demo's commands wrote, which may be damaged or of another version: one line says what is wrong."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from shards import UndecodableImageError, UsageError, decode_image, read_document

_REMEDY = "run the demo's commands again"
_BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),  # an unknown or encrypted member
)


@dataclass(frozen=True)
class Reconstruction:
    """Of eval/reconstruction.py's results.json."""

    psnr: float


@dataclass(frozen=True)
class Generation:
    """Of eval/generation.py's results.json."""

    sampling_seconds: float


@dataclass(frozen=True)
class ComparisonRow:
    """One way of sampling; `who` is the student or its teacher."""

    who: str
    steps: int
    distance: float
    images_per_second: Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Comparison:
    """Of eval/few_step.py's few-step.json."""

    rows: list[ComparisonRow]
    decoder_images_per_second: Annotated[float, Field(gt=0)]
    distance_of_other_stored_tokens: float


def needed(path: Path) -> Path:
    """Return the path of a file or a folder, if its step of the demo has been run.

    Raises:
        UsageError: it has not.
    """
    if not (path.is_dir() or path.is_file()):
        raise UsageError(f"the page shows every step of the demo, but {path} does not exist; run `make demo`")
    return path


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        UsageError: it is not there or cannot be read.
    """
    try:
        return needed(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None


def read_reconstruction(folder: Path) -> Reconstruction:
    """Read the scores of a reconstruction."""
    path = folder / "results.json"
    return read_document(read_bytes(path), Reconstruction, name=path, error=UsageError, remedy=_REMEDY)


def read_generation(folder: Path) -> Generation:
    """Read the facts of a generation."""
    path = folder / "results.json"
    return read_document(read_bytes(path), Generation, name=path, error=UsageError, remedy=_REMEDY)


def read_comparison(folder: Path) -> Comparison:
    """Read the results of eval/few_step.py."""
    path = folder / "few-step.json"
    return read_document(read_bytes(path), Comparison, name=path, error=UsageError, remedy=_REMEDY)


def read_metrics(run: Path) -> list[dict[str, int | float | None]]:
    """Return the lines of a training's metrics that have a loss, at least one; a last line cut short is left out.

    Raises:
        UsageError: another line is not one of metrics, or none has a loss.
    """
    path = run / "metrics.jsonl"
    lines = [
        read_document(
            line,
            dict[str, int | float | None],
            name=f"line {number} of {path}",
            error=UsageError,
            remedy=_REMEDY,
        )
        for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1)
        if line
    ]
    logged = [line for line in lines if line.get("loss") is not None and isinstance(line.get("step"), int)]
    if not logged:
        raise UsageError(f"{path} has no line with a step and a loss; {_REMEDY}")
    return logged


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """Return steps and losses of a training's metrics."""
    lines = read_metrics(run)
    return [int(line["step"] or 0) for line in lines], [float(line["loss"] or 0.0) for line in lines]


def read_samples(folder: Path, num_classes: int, image_size: int) -> NDArray[np.uint8]:
    """Return samples uint8 [n, H, W, 3] of eval/generation.py, at least one a class.

    Args:
        folder: What eval/generation.py wrote.
        num_classes: Classes of the store.
        image_size: Height and width that the images must have, in pixels.

    Raises:
        UsageError: the file holds something else.
    """
    path = needed(folder / "samples.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            samples: NDArray[np.uint8] = file["arr_0"]
    except _BROKEN as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} cannot be read: {reason}; {_REMEDY}") from None
    if samples.dtype != np.uint8 or samples.shape[1:] != (image_size, image_size, 3):
        raise UsageError(
            f"{path} must hold images uint8 [n, {image_size}, {image_size}, 3] like those of the store, got "
            f"{samples.dtype} {list(samples.shape)}; {_REMEDY}"
        )
    if not 1 <= num_classes <= len(samples):
        raise UsageError(
            f"the page shows samples of every class, but {path} has {len(samples)} of {num_classes} classes; "
            f"{_REMEDY}"
        )
    return samples


def read_sheet(path: Path) -> Image.Image:
    """Return an image that a command wrote.

    Raises:
        UsageError: it is not there or cannot be decoded.
    """
    try:
        return decode_image(read_bytes(path))
    except UndecodableImageError as error:
        raise UsageError(f"{path} cannot be decoded: {error}; {_REMEDY}") from None
