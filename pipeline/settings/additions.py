"""Settings of the commands that add to a finished store: frozen dataclasses, free of heavy imports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from pipeline.settings.config import (
    ALLOWED_ERROR,
    EncoderConfig,
    SourceConfig,
    SourceRootsArgument,
    StoreConfig,
    WorkConfig,
)
from pipeline.settings.location_argument import LocationArgument


@dataclass(frozen=True, kw_only=True)
class AddViewConfig:
    """Encode further views of a finished store's images into it, with the same encoder.

    Readers that have the store open are not disturbed. Run again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    views: str
    """Views to add, comma-separated: flip, crop:K. flip is made of stored images; crops need the image files."""
    encoder: str | None = None
    """timm vision transformer. Default: the one the store names."""
    weights: str | None = None
    """Weights of that encoder; they are compared with the store's. Default: where the store's came from."""
    encoder_args: str | None = None
    """Further arguments of the timm model. Default: those the store names."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the encoder through torch.compile; a store keeps what it was begun with."""
    allow_error: float = ALLOWED_ERROR
    """int8: see `pipeline encode`."""
    roots: SourceRootsArgument = ()
    """Folder or URL that the images are in, if the store was not made on this machine. May be given several times."""
    work: tyro.conf.OmitArgPrefixes[WorkConfig] = field(default_factory=WorkConfig)

    def view_names(self) -> tuple[str, ...]:
        """Return `views` as names.

        Raises:
            UsageError: If one is unknown.
        """
        return StoreConfig(shards=1, views=self.views).view_names()


@dataclass(frozen=True, kw_only=True)
class AddFieldConfig:
    """Encode a finished store's images with another encoder into STORE/fields/NAME, a store of the same rows.

    With --compressor the field is derived: compact latents made of the tokens that are stored, without the images.

    Readers that have the store open are not disturbed. Run again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    name: str
    """Name of the field: a plain word, such as siglip2."""
    compressor: Path | None = None
    """Snapshot of a compressor (train/compressor.py, or a decoder trained with --pool): makes latents of the stored
    tokens, instead of an encoder. Its arithmetic is float32 unless --precision is bfloat16."""
    untrained: bool = False
    """Accept an untrained compressor, to try things out."""
    encoder: tyro.conf.OmitArgPrefixes[EncoderConfig] = field(default_factory=EncoderConfig)
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Storage type of the tokens."""
    class_token: bool = False
    """Store the class token of each image and view too, as field `cls`."""
    calibration_rows: int = 1024
    """int8: see `pipeline encode`."""
    code_error: float = 0.0
    """int8: see `pipeline encode`."""
    allow_error: float = ALLOWED_ERROR
    """int8: see `pipeline encode`."""
    roots: SourceRootsArgument = ()
    """Folder or URL that the images are in, if the store was not made on this machine. May be given several times."""
    work: tyro.conf.OmitArgPrefixes[WorkConfig] = field(default_factory=WorkConfig)


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """Encode the images that a source has gained into further shards of a finished store, as a revision of it.

    Images are compared by their keys. Rows, labels and shards of the store keep their number and bytes; images that
    changed or are gone are named, and stay as they were stored. Readers that have the store open are not disturbed. Run
    again, it continues.
    """

    store: tyro.conf.Positional[LocationArgument]
    """Folder of the finished store."""
    source: tyro.conf.Positional[str]
    """The grown source, as `pipeline encode` takes it; or new images alone. For a field STORE/fields/NAME that lacks
    rows which STORE has: STORE."""
    labels: Path | None = None
    """File that fixes class names and their ids, or a store to take them from: the store's own first, in their order.
    Default: new classes get the next free numbers."""
    reading: tyro.conf.OmitArgPrefixes[SourceConfig] = field(default_factory=SourceConfig)
    encoder: str | None = None
    """timm vision transformer. Default: the one the store names."""
    weights: str | None = None
    """Weights of that encoder; they are compared with the store's. Default: where the store's came from."""
    encoder_args: str | None = None
    """Further arguments of the timm model. Default: those the store names."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the encoder through torch.compile; a store keeps what it was begun with."""
    compressor: Path | None = None
    """Of a derived field: the snapshot that its latents were made with."""
    allow_error: float = ALLOWED_ERROR
    """int8: see `pipeline encode`."""
    work: tyro.conf.OmitArgPrefixes[WorkConfig] = field(default_factory=WorkConfig)
