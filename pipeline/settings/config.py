"""Settings of `pipeline encode`: frozen dataclasses, read from the command line, free of heavy imports."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.settings.layers import parse_companion, parse_layers
from pipeline.settings.location_argument import LocationArgument
from shards import FormatName, SourceKind, SourceOptions, UsageError, beside, refuse_credentials

DEFAULT_SOURCE = "data/imagenet/train"
DEFAULT_ENCODER = "vit_base_patch14_reg4_dinov2"
PIXELS_PER_TOKEN = 16
"""Side of the stored crop, for each token of a row of the grid: what a decoder with patches of 16 pixels gives back."""
ALLOWED_ERROR = 0.02
"""int8: largest error of a channel that is accepted unasked, RMS as a share of the channel's standard deviation."""


_RECIPE_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen encoder."""

    encoder: str = DEFAULT_ENCODER
    """timm vision transformer, such as vit_base_patch14_reg4_dinov2, vit_base_patch16_siglip_256.v2_webli,
    vit_base_patch16_224.mae or test_vit; or a recipe, such as raev2-dinov3-l-k7 (docs/encoders.md has them all)."""
    weights: str = "pretrained"
    """`pretrained` (from the HuggingFace hub or its cache), `random:SEED`, or a file or folder of weights in timm,
    HuggingFace or original layout."""
    input_size: int | None = None
    """Side in pixels that the encoder sees. Default: what gives DINOv2, DINOv3, SigLIP and MAE 16 x 16 tokens, 224 or
    256, else timm's."""
    layers: str | None = None
    """Blocks whose tokens are combined, counted from 0: 5,8,11, or 1-23 for all from 1 to 23. Default: the last."""
    combination: Literal["mean", "mean+spatial-mean"] | None = None
    """How blocks are combined: the mean of their normalised tokens, or this plus the spatial mean of the highest
    block's. Default for several blocks: the latter for DINOv3, else the former."""
    encoder_args: str = ""
    """Further arguments of the timm model, comma-separated KEY=VALUE: embed_dim=64,depth=4."""
    precision: Literal["auto", "fp32", "bf16", "float32", "bfloat16"] = "auto"
    """Arithmetic of the encoder; auto is bf16 on a GPU and fp32 on a CPU. float32 and bfloat16 mean the same."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the encoder through torch.compile. auto compiles on a GPU where that takes less time than it saves; a store
    keeps what it was begun with."""

    def __post_init__(self) -> None:
        """Name the precision as recipes do."""
        object.__setattr__(self, "precision", _RECIPE_PRECISIONS.get(self.precision, self.precision))

    def layer_numbers(self) -> tuple[int, ...] | None:
        """`layers` as numbers; None for the last block.

        Raises:
            UsageError: If they are no numbers, or do not ascend.
        """
        return None if self.layers is None else parse_layers(self.layers)

    def model_args(self) -> dict[str, int | float | bool | str]:
        """`encoder_args` as a table.

        Raises:
            UsageError: If one of them is not KEY=VALUE.
        """
        table: dict[str, int | float | bool | str] = {}
        for text in filter(None, self.encoder_args.split(",")):
            key, equals, value = text.partition("=")
            if not (key and equals and value):
                raise UsageError(f"--encoder-args takes KEY=VALUE, got {text!r}; such as depth=4")
            table[key] = _plain_value(value)
        return table


def _plain_value(text: str) -> int | float | bool | str:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """The store that is written."""

    out: LocationArgument = Path("data/store")
    """Folder or URL of the store; run the same command again to continue it."""
    shards: int
    """Exact number of shards."""
    views: str = "center,flip"
    """Ways of showing an image to the encoder, comma-separated: center (crop), flip (its mirror image), crop:K
    (K random crops, each with its own stored image, for decoders)."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Storage type of the tokens."""
    image_size: int | None = None
    """Side of the stored centre crop, in pixels; 0 stores none. Default: 16 for each token of a row."""
    format: FormatName = "zarr"
    """Storage format."""
    class_token: bool = False
    """Store the class token of each image and view too, 2 bytes a channel, as field `cls`."""
    compression: Literal["none", "blosc", "zstd"] = "none"
    """zarr's own compression of the tokens, for cold storage only: readers then leave the fast path."""
    image_compression: Literal["none", "blosc", "zstd"] = "none"
    """zarr's own compression of the images, lossless; blosc makes photographs about half as large."""
    seed: int = 0
    """Seed that spreads the images over the shards and places random crops."""
    stats_from: Path | None = None
    """Published statistics (.pt, .npz or .safetensors with var and, if any, mean) that readers of the store normalise
    by. Default: the exact ones of its tokens, which are kept in any case."""
    calibration_rows: int = 1024
    """int8: images the code is fitted to and judged on before the first shard."""
    code_error: float = 0.0
    """int8: error to aim at, RMS as a share of a channel's std, such as 0.018. More than the smallest possible
    gives codes that compress to fewer bits; 0 is the smallest possible."""
    allow_error: float = ALLOWED_ERROR
    """int8: largest share of its std that a channel may lose. If calibration finds more, encode stops before the
    first shard; if all rows together turn out to have lost more, it ends in an error, with the store complete."""

    def check_int8(self) -> None:
        """Refuse settings of int8 that make no sense.

        Raises:
            UsageError: Naming the setting.
        """
        if self.calibration_rows < 1:
            raise UsageError(f"--calibration-rows must be at least 1, got {self.calibration_rows}")
        if not 0 <= self.code_error < 1:
            raise UsageError(
                f"--code-error must be a share from 0 to below 1, got {self.code_error}; such as 0.018"
            )
        if not self.allow_error > 0:
            raise UsageError(f"--allow-error must be a share above 0, got {self.allow_error}; such as 0.03")

    def view_names(self) -> tuple[str, ...]:
        """Return `views` as names; `crop:K` is crop0 to crop{K-1}, and each of these may be named by itself.

        Raises:
            UsageError: If one is unknown.
        """
        names: list[str] = []
        for text in filter(None, (part.strip() for part in self.views.split(","))):
            kind, _, count = text.partition(":")
            if kind == "crop" and count.isdecimal() and int(count) > 0:
                names += [f"crop{number}" for number in range(int(count))]
            elif text in ("center", "flip") or (text.startswith("crop") and text[4:].isdecimal()):
                names.append(text)
            else:
                raise UsageError(
                    f"--views must be made of center, flip and crop:K, got {text!r}; such as "
                    "center,flip,crop:2"
                )
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """Workers, their devices and threads, and progress."""

    engine: Literal["local", "ray", "slurm", "static"] = "local"
    """Who takes which shard: local (a process a device), ray, slurm (array job), static (RANK and WORLD_SIZE)."""
    devices: str = "auto"
    """Devices of this machine, comma-separated: cpu, cuda:0, cuda:1, mps; `cpu,cpu` is two processes. auto is
    every visible GPU, or one process on the CPU."""
    batch_size: int | None = None
    """Largest batch of the encoder; a shard is cut into equal batches of no more than this. Default: 64 on a CPU, the
    fastest size on a GPU; a store keeps what it was begun with."""
    decode_threads: int | None = None
    """Threads that decode images in each process. Default: the cores divided among the processes."""
    max_attempts: int = 3
    """Failures after which a shard is set aside, and named at the end."""
    max_bad: str = "100%"
    """Share (0.1%) or number of images that may be undecodable; more of them fail the run at its end."""
    max_pixels: int = 100_000_000
    """Pixels of the largest image that is decoded; larger ones are unusable. One of this size takes about 0.8 GB in
    each decode thread; more than 178,956,970 Pillow does not decode."""
    log_dir: Path | None = None
    """Folder for progress.jsonl and worker errors. Default: the store's name with .logs behind it."""
    ray_address: str | None = None
    """Ray cluster to join; by default a Ray of this machine is started."""
    ray_actors: int | None = None
    """Ray actors that encode. Default: one for each GPU of the cluster, or one on the CPU."""
    slurm_tasks: int = 8
    """Tasks of the SLURM array."""
    slurm_args: str = ""
    """Further options for sbatch, such as `--gres=gpu:1 --time=4:00:00`."""
    slurm_submit: bool = False
    """Hand the script to sbatch instead of printing it."""

    def check_counts(self) -> None:
        """Refuse numbers below one where at least one is needed.

        Raises:
            UsageError: Naming the setting.
        """
        for name in (
            "batch_size",
            "decode_threads",
            "max_attempts",
            "max_pixels",
            "ray_actors",
            "slurm_tasks",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    def allowed_bad(self, num_images: int) -> int:
        """Return how many of `num_images` may be undecodable.

        Raises:
            UsageError: If `max_bad` is neither a share from 0% to 100% nor a number from 0.
        """
        text = self.max_bad.strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1])
                if 0 <= share <= 100:
                    return int(share / 100 * num_images)
            elif int(text) >= 0:
                return int(text)
        except ValueError:
            pass
        raise UsageError(
            f"--max-bad must be a share from 0% to 100% or a number from 0, got {text!r}; such as 0.1% or 50"
        )


SourceRootsArgument = Annotated[tuple[str, ...], tyro.conf.arg(name="source"), tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Choices for sources that can be read in several ways."""

    source_kind: SourceKind | None = None
    """Take files of one kind, where several are side by side."""
    split: str | None = None
    """Take one split, such as train, where several are side by side."""
    label_column: str | None = None
    """Column of a table, or key of .json files, that holds the class. Default: label, or the only column with a similar
    name."""
    first_label: bool = False
    """Where labels are lists, take the first of each; by default lists are refused."""
    image_column: str | None = None
    """Column of a parquet file that holds the images. Default: the only one that does."""
    take_readable: bool = False
    """Take what can be read of damaged tars; the store records how much was left out."""
    roots: SourceRootsArgument = ()
    """Further folder or URL that images may be in, such as those that a table names outside of its own folder. May be
    given several times."""

    def options(self) -> SourceOptions:
        """Convert to the options of the source listing."""
        return SourceOptions(
            kind=self.source_kind,
            split=self.split,
            label_column=self.label_column,
            first_label=self.first_label,
            image_column=self.image_column,
            take_readable=self.take_readable,
            roots=self.roots,
        )


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode an image set into a store; run the same command again to continue it."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """Images: a folder (class sub-folders or none), tar, parquet or csv files, or the URL of one of them.
    Default: $IMAGENET, else data/imagenet/train."""
    reading: tyro.conf.OmitArgPrefixes[SourceConfig] = field(default_factory=SourceConfig)
    encoder: tyro.conf.OmitArgPrefixes[EncoderConfig] = field(default_factory=EncoderConfig)
    store: tyro.conf.OmitArgPrefixes[StoreConfig]
    work: tyro.conf.OmitArgPrefixes[WorkConfig] = field(default_factory=WorkConfig)
    also: tuple[str, ...] = ()
    """Further combinations of blocks from the same pass over the network, each a store of the same rows in
    STORE/fields/NAME: NAME=LAYERS, such as k1=23 k23=1-23; behind a colon its --combination, if not the default."""
    retry_quarantined: bool = False
    """Try the unusable images of a store again, once they are repaired: the shards of those that can be decoded now are
    removed and encoded again. For a store that no process has open."""
    dry_run: bool = False
    """Count images, sample and time them, and write nothing."""
    compressor: tyro.conf.Suppress[Path | None] = None
    """Of a derived field: snapshot of the compressor that makes its latents from the source's tokens."""
    labels: Path | None = None
    """File that fixes class names and their ids, or a store to take them from."""

    def check(self) -> None:
        """Read every setting that is more than a plain value once, before anything is begun.

        Raises:
            UsageError: For the first one that cannot be read.
        """
        for place in (self.source_path(), self.encoder.weights, *self.reading.roots):
            refuse_credentials(place)
        self.store.view_names()
        self.store.check_int8()
        self.encoder.model_args()
        self.encoder.layer_numbers()
        self.companions()
        self.work.allowed_bad(0)
        self.work.check_counts()

    def companions(self) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """`also` as blocks and combination by name.

        Raises:
            UsageError: If one cannot be read, or a name comes twice.
        """
        found = [parse_companion(text) for text in self.also]
        table = {name: (layers, combination) for name, layers, combination in found}
        if len(table) < len(found):
            raise UsageError(f"--also must give each field a name of its own, got {' '.join(self.also)}")
        return table

    def source_path(self) -> str:
        """Return where the images are."""
        return self.source or os.environ.get("IMAGENET") or DEFAULT_SOURCE

    def log_dir(self) -> Path:
        """Return where progress and errors are written."""
        if self.work.log_dir is not None:
            return self.work.log_dir
        return beside(self.store.out, f"{self.store.out.name}.logs")
