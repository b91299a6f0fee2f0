"""Settings of the commands on existing stores: frozen dataclasses, free of heavy imports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipeline.settings.config import ALLOWED_ERROR
from pipeline.settings.location_argument import LocationArgument
from shards import FormatName


@dataclass(frozen=True, kw_only=True)
class ReadsStores:
    """What the commands that read stores have in common."""

    follow_links: bool = False
    """Read objects that are behind links inside the store; otherwise a store with links is refused."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(ReadsStores):
    """Re-read every byte of a store and compare it with the manifest; exit code 0 or 1, naming what is wrong."""

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the store."""
    withdraw: bool = False
    """Remove damaged shards from a store that no process reads or writes; the command that wrote it, run again, writes
    them again and finishes the store. Exit code 0 if that can be done."""
    wait: float = 12.0
    """Seconds to watch leases of other machines for a sign of life, before anything is removed."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(ReadsStores):
    """Show what a store holds: recipe, counts, sizes, statistics, unusable images."""

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the store."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ReadsStores):
    """Write a finished store's rows into a new store of another format, bit for bit, or of another storage type.

    Run again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the finished store."""
    out: LocationArgument
    """Folder or URL of the new store."""
    format: FormatName = "webdataset"
    """Storage format of the new store."""
    compression: Literal["none", "blosc", "zstd"] = "none"
    """zarr's own compression of the new store's tokens."""
    image_compression: Literal["none", "blosc", "zstd"] = "none"
    """zarr's own compression of the new store's images."""
    dtype: Literal["same", "float16", "bfloat16", "float32", "int8"] = "same"
    """Storage type of the tokens; same keeps every bit. int8 tokens can only stay int8."""
    calibration_rows: int = 1024
    """int8: rows the code is fitted to and judged on; see `pipeline encode`."""
    code_error: float = 0.0
    """int8: error to aim at; see `pipeline encode`."""
    allow_error: float = ALLOWED_ERROR
    """int8: largest error of a channel that is accepted; see `pipeline encode`."""


@dataclass(frozen=True, kw_only=True)
class ReshardConfig(ReadsStores):
    """Write a finished store's rows into a new store with another number of shards.

    The result is the store an encode into that many shards would have begun. Run again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    out: LocationArgument
    """Folder of the new store."""
    shards: int
    """Exact number of shards of the new store."""


@dataclass(frozen=True, kw_only=True)
class SubsetConfig(ReadsStores):
    """Write some of a finished store's rows into a new store; a row must meet all conditions given.

    Run again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    out: LocationArgument
    """Folder of the new store."""
    classes: tuple[str, ...] = ()
    """Keep the images of these classes, by full name or by the WordNet id or number it begins with."""
    keys: Path | None = None
    """Keep the images named in this file, a key a line."""
    every: int | None = None
    """Of the rows that meet the other conditions, in order of key, keep the first and every N-th after it."""
    sample: int | None = None
    """Of the rows that meet the other conditions, keep this many at random."""
    seed: int = 0
    """Seed of the draw; the same keys and seed give the same sample, however they are sharded."""
    relabel: bool = False
    """Number the remaining classes again, from 0. Default: every label and class name stays."""
    shards: int | None = None
    """Exact number of shards. Default: as many as give shards of the old size."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ReadsStores):
    """Write the rows of several finished stores of one encoder into a new store; classes are united by name.

    Run again, it continues.
    """

    stores: tyro.conf.Positional[tuple[LocationArgument, ...]]
    """Folders of the finished stores; format, compression and seed are the first one's."""
    out: LocationArgument
    """Folder of the new store."""
    shards: int | None = None
    """Exact number of shards. Default: as many as the stores have together."""
    same_numbers: bool = False
    """Classes that are numbers mean the same in all of the stores; without it they are refused."""
    recode: bool = False
    """int8: allow stores with other codes than the first one's; their tokens are coded again, with more loss."""


@dataclass(frozen=True, kw_only=True)
class AssessConfig:
    """Measure what another storage type would change in a finished store: error by channel, bytes, images.

    Another name for `python -m eval.assess`; `pipeline assess --help` lists its options.
    """


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Remove temporary files and dead leases that killed workers left in a store, and superseded revisions.

    Not while somebody reads the store who opened it before it was added to.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the store."""
    wait: float = 12.0
    """Seconds to watch leases of other machines for a sign of life."""
    give_up: bool = False
    """Also remove a view that is only partly added."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ReadsStores):
    """Write a self-contained page about a finished store: images, tokens, classes, channels, shards."""

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the store."""
    out: Path | None = None
    """Page to write. Default: the store's name with .html behind it."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(ReadsStores):
    """Measure how well a finished store's tokens predict its classes.

    Top-1 of a linear probe and of nearest neighbours, on a held-out fifth of the rows.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the finished store, or of one of its fields."""
    rows: int = 50_000
    """Rows to use, at most, drawn by --seed."""
    features: Literal["pooled", "cls"] = "pooled"
    """The feature of a row: its tokens averaged over positions, or its class token."""
    view: str | None = None
    """View whose tokens are used. Default: the store's first."""
    seed: int = 0
    """Seed that draws the rows and those held out."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig(ReadsStores):
    """Write a page of the rows of a finished store that are nearest to one of them."""

    store: tyro.conf.Positional[LocationArgument]
    """Folder or URL of the finished store, or of one of its fields."""
    row: int
    """Row to begin from."""
    count: int = 23
    """How many neighbours to show."""
    rows: int = 50_000
    """Rows to search, at most, spread evenly over the store."""
    features: Literal["pooled", "cls"] = "pooled"
    """The feature of a row: its tokens averaged over positions, or its class token."""
    view: str | None = None
    """View whose tokens are compared. Default: the store's first."""
    out: Path | None = None
    """Page to write. Default: the store's name with the row behind it."""


@dataclass(frozen=True, kw_only=True)
class StatsConfig(ReadsStores):
    """Show the exact statistics of a store's tokens, write them to a file, or compare them with one."""

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    views: str = ""
    """Views to take together, comma-separated. Default: all."""
    out: Path | None = None
    """File to write mean and var [D, h, w] to: stat.pt in the published layout (float32), or .npz or .safetensors
    (float64)."""
    against: Path | None = None
    """File of statistics to compare with, of the same three kinds."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class DiffConfig(ReadsStores):
    """Compare two stores: recipe, images, bytes, tokens; exit code 0 if they are equal, 1 otherwise.

    Rows are compared as the stores' indexes record them, by checksum; `pipeline verify` re-reads the bytes.
    """

    a: tyro.conf.Positional[LocationArgument]
    """Folder of a finished store."""
    b: tyro.conf.Positional[LocationArgument]
    """Folder of another."""
    rows: int = 1024
    """Rows of each field to read, of those whose checksums differ; 0 reads all of them."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Estimate bytes and hours of a planned store or training run, and show the formulas."""

    store: tyro.conf.Positional[LocationArgument | None] = None
    """Store, finished or not, that gives every value without an option. Default: all values come from options."""
    rows: int | None = None
    """Images."""
    encoder: str | None = None
    """Encoder as for `pipeline encode`; decides grid and width."""
    input_size: int | None = None
    """Side in pixels that the encoder sees."""
    grid: int | None = None
    """Token rows and columns: 16 means 16 × 16 tokens."""
    width: int | None = None
    """Channels of a token."""
    latents: str | None = None
    """Plan a field of a flat compressor's latents instead: 32x128 means 32 latents of 128 numbers, without images."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] | None = None
    """Storage type of the tokens. Default: the store's, or float16."""
    views: str | None = None
    """Views as for `pipeline encode`. Default: the store's, or center,flip."""
    image_size: int | None = None
    """Side of the stored images in pixels; 0 stores none. Default: the store's, or 16 for each token of a row."""
    shards: int | None = None
    """Shards. Default: the store's, or 1024, or as many as there are images."""
    devices: int = 1
    """Devices that encode or train."""
    images_per_second: float | None = None
    """Images a device encodes a second, in all views: what `pipeline encode --dry-run` measures."""
    epochs: float | None = None
    """Passes of a training run over the rows."""
    batch_size: int = 1024
    """Global batch of the training run."""
    samples_per_second: float | None = None
    """Samples a device trains on a second, as the trainer's progress line shows."""
    json: bool = False
    """Print JSON instead of text."""
