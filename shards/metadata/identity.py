"""What a store's numbers are: the encoder they come from and the recipe they were made by.

Two identities, each a digest of plain values: `EncoderIdentity` is what store, statistics, decoder and DiT
must share; `Recipe` is what every worker that writes one store must share. Versions of libraries and names
of hosts belong to neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from shards.documents import read_values
from shards.errors import IdentityMismatchError, StoreDamagedError, UsageError
from shards.metadata.stages import Stage, check_stages, planned_rows, shard_capacity
from shards.storage.digests import ALGORITHMS, BLAKE3, SHA256
from shards.values.dtypes import TOKEN_DTYPES
from shards.values.positions import Positions

FormatName = Literal["zarr", "webdataset"]
"""A storage format; `shards.formats.FORMATS` implements each."""
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
COMPRESSED_FORMATS = ("zarr",)
"""Formats whose rows may be compressed one by one."""
COMPRESSIONS = ("blosc", "zstd")
MIRRORED_VIEWS = {"flip": "center"}
"""Views whose image is the left-right mirror of another view's, so that it is not stored twice."""


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


LARGEST_SIDE = 16_384
"""Pixels a side of the largest image that is stored: 768 MiB."""
LARGEST_LATENT = 1 << 27
"""Numbers of the largest latent of an image: 512 MiB as float32. A store that claims larger ones is refused unread."""

SEQUENCE_COMPRESSORS = ("flat-vae",)
"""Compressors whose latents are on no grid; those of every other one are on a coarser grid."""


@dataclass(frozen=True, kw_only=True)
class CompressorIdentity:
    """What makes compact latents of stored tokens: everything that decides which ones."""

    source: EncoderIdentity
    """The encoder of the tokens."""
    source_dtype: str
    """Storage type of the tokens; float16 and int8 tokens give other latents."""
    source_code: str | None
    """Digest of the int8 code of the tokens; None for other storage types."""
    name: str
    """Kind of compressor: ``flat-vae`` or ``pool``."""
    config: dict[str, Any] = field(hash=False)
    """Shape of the network, as plain JSON values."""
    weights_digest: str
    """SHA-256 over the weights of the half that makes latents."""
    value: str
    """What is stored of an image's latents: ``mean``."""
    precision: str
    """Arithmetic of the network."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return {**_shallow(self), "source": self.source.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_dict` gave; unknown and missing keys are refused.

        Raises:
            StoreDamagedError: If the keys are not exactly this class's fields, or a value cannot be.
        """
        _check_keys(cls, values)
        EncoderIdentity.from_dict(values["source"])
        return read_values(values, cls, name="the compressor", error=StoreDamagedError)

    def _deciding(self) -> dict[str, Any]:
        return {**self.to_dict(), "source": self.source._deciding()}


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """Everything that decides which tokens an image gets."""

    name: str
    """Architecture, in the encoder registry's words."""
    weights: str
    """Where the weights came from: ``pretrained``, a file's name, or ``random:SEED``; told, but no part of `id`."""
    weights_digest: str
    """SHA-256 over the weights themselves."""
    preprocessing: dict[str, Any] = field(hash=False)
    """From the stored image to the encoder's input, as plain JSON values."""
    input_size: int
    """Side of the encoder's input, in pixels."""
    grid: tuple[int, int]
    """Token rows and columns (h, w)."""
    width: int
    """Channels of a token (D)."""
    prefix_tokens: int
    """Class and register tokens in front of the grid, which are dropped."""
    final_norm: str
    """Rule of the last normalisation, for instance ``layernorm-no-affine``."""
    aggregation: dict[str, Any] | None = field(default=None, hash=False)
    """Which blocks the tokens are combined from, and how, as plain JSON values; None is the last block alone."""
    compressor: CompressorIdentity | None = None
    """What made these tokens of another encoder's stored ones; None where an encoder made them of images."""

    def __post_init__(self) -> None:
        """Refuse sizes no encoder can have."""
        sizes = (self.input_size, *self.grid, self.width)
        if min(sizes) < 1 or self.prefix_tokens < 0 or self.num_tokens * self.width > LARGEST_LATENT:
            raise UsageError(
                f"an encoder must have sizes from 1 on and latents of at most {LARGEST_LATENT} numbers, not input "
                f"{self.input_size}, grid {self.grid}, width {self.width}, prefix {self.prefix_tokens}"
            )

    @property
    def positions(self) -> Positions:
        """How the tokens of an image are arranged."""
        flat = self.compressor is not None and self.compressor.name in SEQUENCE_COMPRESSORS
        return "sequence" if flat else "grid"

    @property
    def id(self) -> str:
        """Digest shared by everything that belongs to this encoder."""
        return digest_of(self._deciding())

    @property
    def random_weights(self) -> bool:
        """Whether the encoder was never trained."""
        return self.weights.startswith("random:")

    @property
    def num_tokens(self) -> int:
        """Tokens of one image (N = h·w)."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; keys with their default are left out, as in stores older than the key."""
        values = {**_shallow(self), "grid": list(self.grid)}
        for name in _MAY_LACK:
            if values[name] is None:
                del values[name]
        if self.compressor is not None:
            values["compressor"] = self.compressor.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_dict` gave; unknown and missing keys are refused.

        Raises:
            StoreDamagedError: If the keys are not exactly this class's fields.
        """
        _check_keys(cls, values, may_lack=_MAY_LACK)
        if "compressor" in values:
            CompressorIdentity.from_dict(values["compressor"])
        return read_values(values, cls, name="the encoder", error=StoreDamagedError)

    def _deciding(self) -> dict[str, Any]:
        # The same weights may come by name or from a file: their digest decides.
        deciding = {name: value for name, value in self.to_dict().items() if name != "weights"}
        if self.compressor is not None:
            deciding["compressor"] = self.compressor._deciding()
        return deciding

    def diff(self, other: EncoderIdentity) -> list[str]:
        """Return a line for each field that decides about tokens in which ``other`` differs from this one."""
        return _diff(self._deciding(), other._deciding())

    def require_same(self, other: EncoderIdentity, *, what: str) -> None:
        """Refuse ``other`` unless it is this encoder.

        Raises:
            IdentityMismatchError: Naming ``what`` and each field that differs.
        """
        differences = self.diff(other)
        if differences:
            raise IdentityMismatchError(f"{what} belongs to another encoder: {'; '.join(differences)}")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the encoder is run, by everybody who writes a store: tokens are rounded by it."""

    batch_size: int
    """Images a call, at most; shards are cut into the fewest equal batches of no more."""
    compiled: bool
    """Whether the network runs through torch.compile."""

    def __post_init__(self) -> None:
        """Refuse values no store can have."""
        size: object = self.batch_size
        if type(size) is not int or size < 1 or type(self.compiled) is not bool:
            raise StoreDamagedError(f"a store's execution cannot be {self!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides which bytes a store holds."""

    encoder: EncoderIdentity
    source_digest: str
    """Digest of the sorted source listing (`shards.metadata.plan.Plan.source_digest`)."""
    num_images: int
    num_shards: int
    seed: int
    """Seed of the plan that spreads the images over the shards."""
    views: tuple[str, ...]
    """Ways an image is shown to the encoder, for instance ``("center", "flip")``."""
    dtype: str = "float16"
    """Storage type of the tokens; one of `shards.values.dtypes.TOKEN_DTYPES`."""
    image_size: int
    """Side P of the stored image, in pixels; 0 stores no images."""
    precision: str = "float32"
    """Arithmetic of the encoder."""
    format: str = "zarr"
    """``zarr`` or ``webdataset``."""
    compression: str | None = None
    """Codec of the tokens: None, ``blosc`` or ``zstd`` (zarr only)."""
    image_compression: str | None = None
    """Codec of the images, likewise."""
    code: str | None = None
    """Digest of the int8 code (`shards.values.quantize.Int8Code.digest`); None for other storage types."""
    calibration_rows: int = 0
    """Images the code was fitted to; 0 for other storage types."""
    code_error: float = 0.0
    """Error the code was to aim at, as a share of a channel's deviation; 0 is the smallest possible."""
    class_token: bool = False
    """Whether the encoder's class token is stored beside the tokens."""
    object_digest: str = BLAKE3
    """Algorithm of the digests of the shards' objects; SHA-256 in stores that do not name one. It decides about no row
    and is no part of `id`, so that a store is continued with the one it was begun with."""
    earlier: tuple[Stage, ...] = ()
    """What the store held before each of its extensions; images, shards and source digest are those of now."""
    execution: Execution | None = None
    """How the encoder is run; None in stores of earlier versions. No part of `id`: it decides about rounding alone."""

    def __post_init__(self) -> None:
        """Refuse values no store can have."""
        self._check_storage()
        self._check_code()
        if not self.views or len(set(self.views)) != len(self.views):
            raise UsageError(f"views must be named once each and at least one, not {self.views!r}")
        for view in self.views:
            if not (view.isidentifier() and view.isascii()) or view in RESERVED_NAMES:
                raise UsageError(
                    f"a view's name must be a plain word other than {sorted(RESERVED_NAMES)}, not {view!r}"
                )
            if view in MIRRORED_VIEWS and MIRRORED_VIEWS[view] not in self.views:
                raise UsageError(
                    f"view {view!r} mirrors {MIRRORED_VIEWS[view]!r}, so that view must be asked for too"
                )
        self._check_shards()

    def _check_shards(self) -> None:
        if not 1 <= self.num_shards <= self.num_images:
            raise UsageError(
                f"shards must be between 1 and the {self.num_images} images, not {self.num_shards}"
            )
        try:
            check_stages(self.num_images, self.num_shards, self.earlier)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not 0 <= self.image_size <= LARGEST_SIDE:
            raise UsageError(f"image size must be 0 to {LARGEST_SIDE} pixels, not {self.image_size}")

    def _check_storage(self) -> None:
        if self.dtype not in TOKEN_DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(TOKEN_DTYPES)}, not {self.dtype!r}")
        if self.dtype == "int8" and self.encoder.positions == "sequence":
            raise UsageError(
                "latents in a sequence are not stored as int8, whose code has one table a channel for all places: a "
                "channel means another thing in each latent; store them as float16, bfloat16 or float32"
            )
        if self.format not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)}, not {self.format!r}")
        for codec in filter(None, (self.compression, self.image_compression)):
            if codec not in COMPRESSIONS:
                raise UsageError(
                    f"compression must be none or one of {', '.join(COMPRESSIONS)}, not {codec!r}"
                )
            if self.format not in COMPRESSED_FORMATS:
                raise UsageError(f"compression is zarr's own; a {self.format} store is written without it")
        if self.object_digest not in ALGORITHMS:
            raise UsageError(f"digests are {' or '.join(ALGORITHMS)}, not {self.object_digest!r}")

    def _check_code(self) -> None:
        if self.dtype != "int8" and (self.code, self.calibration_rows, self.code_error) != (None, 0, 0.0):
            raise UsageError(f"only int8 tokens have a code to calibrate, not {self.dtype}")
        if self.calibration_rows < 0 or not 0 <= self.code_error < math.inf:
            raise UsageError(
                "calibration rows and the error aimed at must not be negative, got "
                f"{self.calibration_rows} and {self.code_error}"
            )

    @property
    def id(self) -> str:
        """Digest shared by every worker that writes the same store."""
        return digest_of(self._deciding())

    @property
    def capacity(self) -> int:
        """Rows of every shard, spare ones included: ⌈n / N⌉ of what the store began with."""
        return shard_capacity(self.num_images, self.num_shards, self.earlier)

    @property
    def num_rows(self) -> int:
        """Rows of every array of the store, spare ones included."""
        return self.capacity * self.num_shards

    @property
    def planned_rows(self) -> NDArray[np.int64]:
        """Row of each image, ascending, int64[n]: every row that is not spare."""
        return planned_rows(self.num_images, self.num_shards, self.earlier)

    def at_stage(self, stage: int, num_views: int | None = None) -> Self:
        """Return the recipe as of before one of its extensions; `len(earlier)` is the recipe itself.

        Args:
            stage: Number of extensions there were.
            num_views: Number of views there were; None: as now.
        """
        views = self.views[:num_views]
        if stage == len(self.earlier):
            return self if views == self.views else dataclasses.replace(self, views=views)
        was = self.earlier[stage]
        return dataclasses.replace(
            self,
            views=views,
            source_digest=was.source_digest,
            num_images=was.num_images,
            num_shards=was.num_shards,
            earlier=self.earlier[:stage],
        )

    def states(self) -> Iterator[tuple[int, int]]:
        """Yield each number of extensions and of views that a store may have had, the present ones first."""
        for stage in range(len(self.earlier), -1, -1):
            for num_views in range(len(self.views), 0, -1):
                views = self.views[:num_views]
                if all(MIRRORED_VIEWS.get(view, view) in views for view in views):
                    yield stage, num_views

    def fields(self, view: str) -> tuple[str, ...]:
        """Return the fields stored for a view; a mirrored view keeps no image."""
        has_image = self.image_size > 0 and view not in MIRRORED_VIEWS
        return "tokens", *["image"] * has_image, *["cls"] * self.class_token

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; keys with their default, or with earlier versions' behaviour, are left out."""
        values = {**_shallow(self), "encoder": self.encoder.to_dict(), "views": list(self.views)}
        values["earlier"] = [stage.to_dict() for stage in self.earlier]
        for name in ("class_token", "earlier"):
            if not values[name]:
                del values[name]
        if self.object_digest == SHA256:
            del values["object_digest"]
        del values["execution"]
        if self.execution is not None:
            values["execution"] = dataclasses.asdict(self.execution)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_dict` gave; unknown and missing keys are refused.

        Raises:
            StoreDamagedError: If the keys are not exactly this class's fields.
        """
        _check_keys(cls, values, may_lack={"class_token", "object_digest", "execution", "earlier"})
        EncoderIdentity.from_dict(values["encoder"])
        if "execution" in values:
            _check_keys(Execution, values["execution"])
        return read_values(
            {"object_digest": SHA256, **values}, cls, name="the recipe", error=StoreDamagedError
        )

    def _deciding(self) -> dict[str, Any]:
        deciding = {name: value for name, value in self.to_dict().items() if name not in _NOT_DECIDING}
        return {**deciding, "encoder": self.encoder.id}

    def extends(self, begun: Recipe) -> bool:
        """Return whether this is ``begun``, or ``begun`` with further views or extended with further images."""
        stage = len(begun.earlier)
        if stage > len(self.earlier) or self.views[: len(begun.views)] != begun.views:
            return False
        return dataclasses.replace(self.at_stage(stage), views=begun.views).id == begun.id

    def diff(self, other: Recipe) -> list[str]:
        """Return a line for each field that decides about bytes in which ``other`` differs from this one."""
        own, others = ({**recipe._deciding(), "encoder": None} for recipe in (self, other))
        return [f"encoder.{line}" for line in self.encoder.diff(other.encoder)] + _diff(own, others)


_NOT_DECIDING = ("object_digest", "execution")
"""Fields of a recipe that decide about no row, or about its rounding alone; a store keeps those it was begun with."""

RESERVED_NAMES = frozenset(
    {
        "c",
        "code",
        "commits",
        "fields",
        "index",
        "label",
        "manifest",
        "moments",
        "plan",
        "revisions",
        "stats",
        "valid",
    }
)
"""First path components a store uses itself, which no view may have as its name."""


_MAY_LACK = frozenset({"aggregation", "compressor"})
"""Fields of an encoder's identity that are left out where they say nothing."""


def _shallow(value: EncoderIdentity | CompressorIdentity | Recipe) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _check_keys(cls: type, values: Any, may_lack: Set[str] = frozenset()) -> None:
    expected = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) | may_lack != expected:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise StoreDamagedError(
            f"{cls.__name__} must have exactly the keys {sorted(expected)}, found {found}"
        )


def _diff(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _diff(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} is {a!r}, the other has {b!r}")
    return lines
