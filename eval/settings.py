"""Settings of the generation and reconstruction commands. No torch: `--help` must answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from tyro.conf import Positional, arg

from shards import UsageError

Precision = Literal["fp32", "tf32", "bf16"]
LabelRule = Literal["equal", "random"]
Guidance = Literal["none", "cfg", "autoguidance", "internal"]
Prediction = Literal["velocity", "x"]
GridKind = Literal["published", "to-zero", "uniform"]
SamplerName = Literal["euler-50", "euler-50-to-zero", "euler-100-to-zero", "jump-1", "jump-2", "jump-4"]
ProtocolName = Literal[
    "imagenet256-unguided",
    "imagenet256-guided",
    "imagenet512-unguided",
    "imagenet512-guided",
    "raev2-imagenet256-unguided",
    "raev2-imagenet256-internal",
    "imagenet256-one-step",
    "imagenet256-two-step",
    "imagenet512-one-step",
    "imagenet512-two-step",
]
SetMetric = Literal["fid", "sfid", "is", "precision_recall", "fd_dinov2", "fdr6", "mind", "mind6"]
NetworkName = Literal["inception", "dinov2", "convnext", "dinov2-256", "mae", "siglip", "clip"]
"""Feature networks; dinov2 is FD-DINOv2's, at 224 pixels, dinov2-256 is FDr6's."""
PairMetric = Literal["psnr", "ssim", "lpips", "rfid"]

DecoderOutput = Literal["auto", "normalised", "image"]

ADM_METRICS: tuple[SetMetric, ...] = ("fid", "sfid", "is", "precision_recall")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Sample images from a DiT snapshot and, against a reference, evaluate them.

    Sample i depends on the seed and on i alone. Run again after an interruption, the command continues.
    """

    snapshot: Positional[Path]
    """Snapshot of a DiT: RUN/snapshots/latest.safetensors (its averaged weights); or RAE's published stage2_model.pt or
    RAEv2's checkpoint.pt."""
    decoder: Path
    """Snapshot of the decoder for the same encoder; or a published model.pt, or diffusers' AutoencoderRAE folder."""
    decoder_output: DecoderOutput = "auto"
    """What a published decoder puts out: normalised pixels, as RAE's, or the image, as RAEv2's; files do not say. auto:
    the image for DINOv3, for tokens of several blocks and for encoders with the tag .raev2."""
    compressor: Path | None = None
    """Snapshot of the compressor that made the DiT's latents, where one did: makes tokens of them for the decoder."""
    encoder_of: Path | None = None
    """Store whose encoder published files belong to: they do not say. Snapshots do and need none."""
    statistics: Path | None = None
    """stat.pt, or diffusers' folder, of a published DiT's latents; default the statistics of the store."""
    out: Path = Path("runs/generation")
    """Folder for samples.npz, grid.png and results.json."""
    protocol: ProtocolName | None = None
    """A published evaluation: sets number, labels, sampler, guidance, metrics and reference not given here."""
    num_samples: Annotated[int | None, arg(aliases=["--num"])] = None
    """Number of samples; 64 without a protocol. torchrun takes the short --num for an option of its own."""
    seed: int = 0
    """Seed of noise and random labels."""
    labels: LabelRule | None = None
    """equal: sample i has class i modulo the number of classes; random: drawn evenly. Default equal."""
    classes: tuple[int, ...] = ()
    """Only these classes, in this order; default all of the snapshot's."""
    sampler: SamplerName | None = None
    """euler-50: RAE's 50 points, 49 evaluations; euler-50-to-zero and euler-100-to-zero: 50 and 100 evaluations that
    end at the data; jump-1, -2 and -4: as many evaluations of a few-step model. Default euler-50; euler-50-to-zero for
    a model that predicts the data, jump-1 for a few-step model."""
    points: int | None = None
    """Points of the time grid, instead of the sampler's."""
    method: str | None = None
    """euler, heun, a torchdiffeq solver or jump, instead of the sampler's."""
    time_grid: GridKind | None = None
    """Times instead of the sampler's: published ends at 0.001 before the shift, to-zero on the data, uniform is
    not shifted. jump-2 --time-grid to-zero jumps over the shifted middle."""
    shift_base: int | None = None
    """Numbers in a latent for which times are not shifted toward noise; default as the model was trained."""
    guidance: Guidance | None = None
    """cfg: classifier-free; autoguidance: by a weaker model; internal: by the model's own base output. Default none."""
    guidance_scale: float | None = None
    """Weight of the guided direction; 1 is no guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Times in which guidance acts, both ends included; 0 is data, 1 is noise. Default 0 1, or the protocol's."""
    internal_scale: float | None = None
    """Weight of internal guidance beneath cfg or autoguidance, which then guide what it gives."""
    internal_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which that internal guidance acts."""
    unconditional_scale: float | None = None
    """Weight of internal guidance of the prediction without a class, beneath cfg; default as of the other."""
    base_depth: int | None = None
    """Blocks after which a published checkpoint.pt of RAEv2 has its base output; default the published network's."""
    guide: Path | None = None
    """Snapshot of the weaker DiT for autoguidance; or a published file with the same statistics."""
    precision: Precision = "fp32"
    """Arithmetic of the networks; noise and integration are always float32. Published numbers: fp32 or tf32."""
    batch_size: int | None = None
    """Samples computed together a process; default as many as fit."""
    compile: bool = False
    """Compile the networks: minutes at the start, faster after."""
    rounding: bool = False
    """Round to 8 bits instead of truncating as the published evaluation does."""
    pngs: bool = False
    """Also write each sample as a PNG into OUT/png."""
    grid_columns: int = 8
    """Images a row of grid.png; with equal labels a row shows one class."""
    grid_rows: int = 32
    """Most rows of grid.png."""
    reference: Path | None = None
    """What to compare with: images as for `pipeline encode`, store, .npz of images, or statistics. None: no metrics."""
    metrics: tuple[SetMetric, ...] | None = None
    """Metrics against the reference; default fid, sfid, is, precision_recall."""
    feature_weights: str = "public"
    """Inception weights: public, a file, or random:SEED."""
    dinov2_weights: str = "public"
    """DINOv2 weights for fd_dinov2: public, a file, or random:SEED."""
    representation_weights: tuple[str, ...] = ()
    """Weights for fdr6 and mind6, each as NAME=public, NAME=FILE or NAME=random:SEED; NAME is convnext, dinov2-256,
    mae, siglip or clip. Default public."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything heavy is loaded."""
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError(f"--num-samples must be at least 1, got {self.num_samples}")
        if self.points is not None and self.points < 2:
            raise UsageError(f"--points must be at least 2, a start and an end, got {self.points}")
        if self.shift_base is not None and self.shift_base < 1:
            raise UsageError(f"--shift-base must be at least 1, got {self.shift_base}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, got {self.batch_size}")
        for name in ("guidance_interval", "internal_interval"):
            low, high = getattr(self, name) or (0.0, 1.0)
            if not 0.0 <= low <= high <= 1.0:
                raise UsageError(
                    f"--{name.replace('_', '-')} must be two times 0 ≤ low ≤ high ≤ 1, got {low} {high}"
                )
        if self.grid_columns < 1 or self.grid_rows < 1:
            raise UsageError(
                f"a grid needs at least 1 column and row, got {self.grid_columns} and {self.grid_rows}"
            )


def weights_by_name(given: tuple[str, ...]) -> dict[NetworkName, str]:
    """Return weights given as NAME=WEIGHTS.

    Raises:
        UsageError: There is no such network.
    """
    found: dict[NetworkName, str] = {}
    for text in given:
        name, _, weights = text.partition("=")
        if name not in get_args(NetworkName) or not weights:
            raise UsageError(
                f"weights of a representation are NAME=public, NAME=FILE or NAME=random:SEED with NAME one of "
                f"{', '.join(get_args(NetworkName))}; got {text}"
            )
        found[cast("NetworkName", name)] = weights
    return found


@dataclass(frozen=True, kw_only=True)
class FewStepSettings:
    """Compare one, two, four and fifty steps of a few-step model with steps of its teacher, from the same noise."""

    snapshot: Positional[Path]
    """Snapshot of the few-step model: RUN/snapshots/latest.safetensors of a stage -cmt, -mfd or -mft; or a published
    file."""
    teacher: Path
    """Snapshot of the model it was distilled from, or a published file."""
    decoder: Path
    """Decoder for the same encoder: a snapshot, a published file or diffusers' folder."""
    compressor: Path | None = None
    """Snapshot of the compressor that made the store's latents, where one did."""
    statistics: Path | None = None
    """stat.pt of published files' latents; default the statistics of the store."""
    store: str | Path
    """Store they were trained on; its tokens are what generated ones are compared with."""
    out: Path = Path("runs/few-step")
    """Folder for few-step.json and few-step.png."""
    num_samples: int = 512
    """Samples whose tokens are compared."""
    columns: int = 12
    """Images a line of the sheet."""
    seed: int = 0
    """Seed of the noise."""
    precision: Precision = "fp32"
    """Arithmetic of the networks."""
    batch_size: int = 32
    """Samples computed together."""
    compile: bool = False
    """Compile the networks, the decoder too."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything heavy is loaded."""
        if self.num_samples < 2 or self.batch_size < 1 or not 1 <= self.columns <= self.num_samples:
            raise UsageError(
                "--num-samples must be at least 2, --batch-size at least 1 and --columns between 1 and the samples; "
                f"got {self.num_samples}, {self.batch_size} and {self.columns}"
            )


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
    """Decode a store's tokens and compare the images with the stored originals."""

    store: Positional[str | Path]
    """Folder or URL of a finished store with images."""
    follow_links: bool = False
    """Read objects that are behind links inside the store; otherwise a store with links is refused."""
    decoder: Path
    """Snapshot of a decoder for the store's encoder; or a model.pt or diffusers' folder, taken to belong to it."""
    decoder_output: DecoderOutput = "auto"
    """What a published decoder puts out: normalised pixels or the image; see eval/generation.py."""
    compressor: Path | None = None
    """Send the store's tokens through this compressor and back first; of a store of latents, the one that made them."""
    out: Path = Path("runs/reconstruction")
    """Folder for reconstruction.png and results.json."""
    rows: Annotated[int | None, arg(aliases=["--num"])] = None
    """Rows to use, spread evenly over the store; default all."""
    metrics: tuple[PairMetric, ...] = ("psnr", "ssim")
    """psnr, ssim, lpips, rfid; the last two need network weights."""
    page_rows: int = 8
    """Images in each of the three parts of reconstruction.png: best, median, worst."""
    precision: Precision = "fp32"
    """Arithmetic of the decoder."""
    batch_size: int | None = None
    """Rows decoded together a process; default as many as fit."""
    rounding: bool = False
    """Round to 8 bits instead of truncating as the published evaluation does."""
    reference: Path | None = None
    """Compare rFID with these images instead of the originals: as for `pipeline encode`, store, .npz or statistics."""
    feature_weights: str = "public"
    """Inception weights for rfid: public, a file, or random:SEED."""
    perceptual_weights: Annotated[str, arg(aliases=["--lpips-weights"])] = "public"
    """VGG16 of LPIPS: public, a file in torchvision's names, or random:SEED."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything heavy is loaded."""
        if self.rows is not None and self.rows < 1:
            raise UsageError(f"--rows must be at least 1, got {self.rows}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.page_rows < 1:
            raise UsageError(f"--page-rows must be at least 1, got {self.page_rows}")


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Compute the feature statistics of reference images once; `--reference` then takes the file for the images."""

    images: Positional[Path]
    """Image folder, or tar, parquet or csv files as for `pipeline encode`; store; or .npz of images."""
    out: Path
    """File to write, .npz."""
    image_size: int = 256
    """Side of the images: those of a source are centre-cropped to it, stored ones must have it."""
    feature_weights: str = "public"
    """Inception weights: public, a file, or random:SEED; comparisons must use the same."""
    networks: tuple[NetworkName, ...] = ("inception",)
    """Feature networks to save the statistics of: inception for fid, sfid, precision_recall and mind; dinov2 for
    fd_dinov2; inception, convnext, dinov2-256, mae, siglip and clip for fdr6 and mind6."""
    network_weights: tuple[str, ...] = ()
    """Weights of the others, each as NAME=public, NAME=FILE or NAME=random:SEED. Default public."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything heavy is loaded."""
        if self.image_size < 1:
            raise UsageError(f"--image-size must be at least 1, got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class AssessSettings:
    """Measure what another storage type would change in a finished store: error by channel, bytes, decoded images."""

    store: Positional[str | Path]
    """Folder or URL of the finished store."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "int8"
    """Storage type to assess."""
    rows: int = 1024
    """Rows to assess it on; int8 is fitted to every other one and judged on the rest."""
    code_error: float = 0.0
    """int8: error to aim at; see `pipeline encode`."""
    decoder: Path | None = None
    """Decoder, as `eval/reconstruction.py` takes it: decodes the judged rows before and after, to compare them."""
    metrics: tuple[Literal["psnr", "ssim", "rfid"], ...] = ("psnr", "ssim")
    """What the images are judged by; rfid needs network weights."""
    feature_weights: str = "public"
    """Inception weights for rfid: public, a file, or random:SEED."""
    scratch: Path | None = None
    """Not used any more: nothing is written."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before anything heavy is loaded."""
        if self.rows < 2:
            raise UsageError(f"--rows must be at least 2, got {self.rows}")


def require_reference(path: Path | None) -> None:
    """Refuse images to compare with that are not there, before anything heavy is loaded.

    Raises:
        UsageError: Naming the path.
    """
    if path is None or path.exists() or any(path.parent.glob(path.name)):
        return
    raise UsageError(
        f"images to compare with are a folder, tar, parquet or csv files, a store or an .npz file; "
        f"found nothing at {path}"
    )


def require_decoder(path: Path) -> None:
    """Refuse a decoder that is not there, before anything heavy is loaded.

    Raises:
        UsageError: There is neither a file nor a folder.
    """
    if not path.exists():
        raise UsageError(
            f"--decoder must be a file like RUN/snapshots/latest.safetensors, or a folder, found none at {path}"
        )
