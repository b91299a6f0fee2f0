"""Where each object of a store lies, and the shape and type of what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.errors import StoreDamagedError
from shards.metadata.identity import Recipe
from shards.values.dtypes import StorageType, storage_type

MANIFEST = "manifest.json"
PLAN = "plan.parquet"
REPAIRED = "repaired.json"
INDEX = "index.parquet"
ROOT = "zarr.json"
REVISIONS = "revisions"
FIELDS = "fields"
WORK_DIR = ".work"
"""Folder inside a store for what is of use only while it is written."""
CODE_TABLE = "code/table/c/0/0"


@dataclass(frozen=True)
class Field:
    """One array of a store: a view's tokens, images or class tokens.

    Attributes:
        view: Way the image was shown to the encoder.
        name: ``tokens``, ``image`` or ``cls``.
        row_shape: Shape of one row.
        dtype: How its numbers are stored.
        compression: Codec of each row, ``blosc`` or ``zstd``; None stores rows as they are.
    """

    view: str
    name: str
    row_shape: tuple[int, ...]
    dtype: StorageType
    compression: str | None = None

    @property
    def path(self) -> str:
        """Name of the array inside the store, ``view/field``."""
        return f"{self.view}/{self.name}"

    @property
    def row_nbytes(self) -> int:
        """Bytes of one uncompressed row."""
        return math.prod(self.row_shape) * self.dtype.numpy.itemsize


def field_of(recipe: Recipe, view: str, name: str) -> Field:
    """Return the description of one array of a store made by ``recipe``."""
    if name == "tokens":
        encoder = recipe.encoder
        shape = (encoder.num_tokens, encoder.width)
        return Field(view, name, shape, storage_type(recipe.dtype), recipe.compression)
    if name == "cls":  # after the last norm no number exceeds √D, so float16 holds it whatever the tokens are
        return Field(view, name, (recipe.encoder.width,), storage_type("float16"))
    assert name == "image", name
    side = recipe.image_size
    return Field(view, name, (side, side, 3), storage_type("uint8"), recipe.image_compression)


def fields_of(recipe: Recipe, view: str) -> tuple[Field, ...]:
    """Return every array stored for a view."""
    return tuple(field_of(recipe, view, name) for name in recipe.fields(view))


def plan_path(recipe: Recipe) -> str:
    """Return where the plan of a recipe lies; the one that a store was begun with stays as ``plan.parquet``."""
    return checked_path(f"plan-{recipe.source_digest}.parquet") if recipe.earlier else PLAN


def stage_path(name: str, stage: int) -> str:
    """Return where statistics of an earlier stage of an extended store lie.

    Args:
        name: Its name under ``stats``.
        stage: Number of extensions before it.
    """
    return name.replace("stats/", f"stats/stage-{stage}/", 1)


def commit_path(view: str, shard: int) -> str:
    """Record that a shard of a view is finished."""
    return f"commits/{view}/{shard:05d}.json"


def derived_path(name: str, revision: int) -> str:
    """Return the path of a small object that each revision of a store writes again.

    Args:
        name: Its name in revision 0: the index, or something under ``label``, ``valid`` or ``stats``.
        revision: Number of the revision.
    """
    return f"{REVISIONS}/{revision}/{name}" if revision else name


def moments_path(view: str, shard: int) -> str:
    """Return partial sums of a shard of a view."""
    return f"moments/{view}/{shard:05d}.npy"


def checked_field(name: object) -> str:
    """Return the name of an added field read from a file, if it is a plain word.

    Raises:
        StoreDamagedError: If it is not.
    """
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
        raise StoreDamagedError(f"a field's name must be a plain word, found {name!r}")
    return name


def checked_path(path: object) -> str:
    """Return an object's name read from a file, if it stays inside the store.

    Raises:
        StoreDamagedError: If it is not a plain relative path.
    """
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if (
        not parts
        or path != "/".join(parts)
        or "\0" in str(path)
        or any(part in ("/", "..", ".") for part in parts)
    ):
        raise StoreDamagedError(f"an object's name must be a relative path inside the store, found {path!r}")
    return str(path)
