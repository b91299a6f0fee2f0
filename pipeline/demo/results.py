"""Reads what the demo's commands wrote, which may be damaged or of another version: one line says what is wrong."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Gt
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import TypedDict

from shards import UsageError, decode_image, read_document

_REMEDY = "run the demo's commands again"
_BROKEN = (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


class Reconstruction(TypedDict):
    """Of eval/reconstruction.py's results.json."""

    psnr: float


class Generation(TypedDict):
    """Of eval/generation.py's results.json."""

    sampling_seconds: float


class ComparisonRow(TypedDict):
    """One way of sampling; `who` is the student or its teacher."""

    who: str
    steps: int
    distance: float
    images_per_second: Annotated[float, Gt(0)]


class Comparison(TypedDict):
    """Of eval/few_step.py's few-step.json."""

    rows: list[ComparisonRow]
    decoder_images_per_second: Annotated[float, Gt(0)]
    distance_of_other_stored_tokens: float


def needed(path: Path) -> Path:
    """Return the path of a file or a folder, if its step of the demo has been run."""
    if not (path.is_dir() or path.is_file()):
        raise UsageError(f"the page shows every step of the demo, but {path} does not exist; run `make demo`")
    return path


def read_reconstruction(folder: Path) -> Reconstruction:
    """Read the scores of a reconstruction."""
    path = needed(folder / "results.json")
    return read_document(path.read_bytes(), Reconstruction, name=path, error=UsageError, remedy=_REMEDY)


def read_generation(folder: Path) -> Generation:
    """Read the facts of a generation."""
    path = needed(folder / "results.json")
    return read_document(path.read_bytes(), Generation, name=path, error=UsageError, remedy=_REMEDY)


def read_comparison(folder: Path) -> Comparison:
    """Read the results of eval/few_step.py."""
    path = needed(folder / "few-step.json")
    return read_document(path.read_bytes(), Comparison, name=path, error=UsageError, remedy=_REMEDY)


def read_metrics(run: Path) -> list[dict[str, int | float | None]]:
    """Return the lines of a training's metrics that have a loss, at least one; a last line cut short is left out.

    Raises:
        UsageError: another line is not one of metrics, or none has a loss.
    """
    path = needed(run / "metrics.jsonl")
    lines = [
        read_document(
            line,
            dict[str, int | float | None],
            name=f"line {number} of {path}",
            error=UsageError,
            remedy=_REMEDY,
        )
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)
        if line
    ]
    logged = [line for line in lines if line.get("loss") is not None and line.get("step") is not None]
    if not logged:
        raise UsageError(f"{path} has no line with a step and a loss; {_REMEDY}")
    return logged


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """Return steps and losses of a training's metrics."""
    lines = read_metrics(run)
    return [int(line["step"] or 0) for line in lines], [float(line["loss"] or 0.0) for line in lines]


def read_samples(folder: Path, num_classes: int) -> NDArray[np.uint8]:
    """Return samples uint8 [n, H, W, 3] of eval/generation.py, at least one a class.

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
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[-1] != 3:
        raise UsageError(
            f"{path} must hold images uint8 [n, H, W, 3], got {samples.dtype} {list(samples.shape)}; {_REMEDY}"
        )
    if not 1 <= num_classes <= len(samples):
        raise UsageError(
            f"the page shows samples of every class, but {path} has {len(samples)} of {num_classes} classes; "
            f"{_REMEDY}"
        )
    return samples


def read_sheet(path: Path) -> Image.Image:
    """Return an image that a command wrote."""
    try:
        return decode_image(needed(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None
