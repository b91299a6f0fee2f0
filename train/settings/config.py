"""Settings of the three trainers: frozen dataclasses whose field docstrings are the command line's help.

A *free* setting may change whenever a run is continued; every other one is *fixed*, because another value
would make another run (`train.settings.saved_settings` compares them). `None` stands for "decided when the run starts"
and is replaced by what was decided before the settings are saved.

A setting that is added later needs a default under which a run does what it did before: a config.json of an earlier
version is read as if it held that default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

from shards import UsageError
from train.settings.few_step import MeanFlowSettings, MidTrainingSettings, TeacherGuidance

Precision = Literal["fp32", "tf32", "bf16"]
Prediction = Literal["velocity", "x"]
Objective = Literal["velocity", "mid-training", "mean-flow"]
"""Names of `train.tasks.objectives.OBJECTIVES`."""
JUMPING: frozenset[Objective] = frozenset({"mid-training", "mean-flow"})
"""Objectives of a network with an end time beside t, which is sampled in jumps."""
OptimizerName = Literal["adamw", "muon"]
"""Names of `train.engine.optimizer.OPTIMIZERS`."""

FREE = {"free": True}
"""Metadata of a field that may change when a run is continued."""


@dataclass(frozen=True, kw_only=True)
class DiTNetwork:
    """Shape of a diffusion transformer; token width, grid and class count come from the store."""

    width: int | Literal["auto"]
    """Width of the deep part. auto: the token width, at least 128."""
    depth: int
    """Number of blocks of the deep part."""
    num_heads: int
    """Attention heads a block of the deep part."""
    head_width: int | Literal["auto"] | None = None
    """Width of DiT-DH's wide head. auto: the token width, at least 192. None: a plain DiT without a head."""
    head_depth: int = 2
    """Number of blocks of the wide head."""
    head_num_heads: int = 16
    """Attention heads a block of the wide head."""
    patch_size: int = 1
    """Side of the square of latent positions that becomes one token of the transformer."""
    qk_norm: bool = False
    """Normalise queries and keys a head; steadies training in bfloat16. With conditioning tokens it is always done."""
    conditioning: Literal["adaln", "tokens"] = "adaln"
    """adaln: time and class modulate every block; tokens: they are tokens of the sequence, as in RAEv2."""
    base_depth: int | None = None
    """Deep blocks after which a base output is read, with conditioning tokens; None: there is none."""
    mlp_width: int | None = None
    """Hidden width of a plain DiT's MLPs; None: two thirds of four times the width."""
    grid: tuple[int, int] | None = None
    """Token grid the store must have; None: whatever it has."""
    positions: Literal["grid", "sequence"] | None = None
    """Positions that the store's latents must have: on a grid, or in a sequence as a flat compressor's; None: any."""

    def __post_init__(self) -> None:
        """Refuse a base output where no network has one."""
        if self.base_depth is not None and self.conditioning != "tokens":
            raise UsageError(
                "--model.base-depth needs --model.conditioning tokens: only those networks have a base output"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderNetwork:
    """Shape of a ViT decoder; token width, grid and image size come from the store."""

    width: int
    """Width of the residual stream."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads a block."""
    mlp_width: int
    """Hidden width of the MLPs."""
    patch_size: int | None = None
    """Pixels a side of the patch that a token becomes, which the store must have; None: image size / grid."""
    grid: tuple[int, int] | None = None
    """Token grid the store must have; None: whatever it has."""
    output: Literal["normalised", "image"] = "normalised"
    """What the last layer puts out: pixels normalised by the encoder's mean and std, as in RAE, or the image
    itself, as in RAEv2."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer, gradient clipping and the schedule, whose epochs are floor(rows / global batch) steps."""

    kind: OptimizerName = "adamw"
    """The optimizer. muon: Muon for parameters with two dimensions, AdamW for the others."""
    lr: float = 2e-4
    """Learning rate before it decays."""
    final_lr: float = 2e-5
    """Learning rate after it has decayed."""
    schedule: Literal["constant", "linear", "cosine", "warmup-stable-decay"] = "constant"
    """Shape of the decay from `hold_epochs` to `decay_end_epoch`. warmup-stable-decay: rise during `hold_epochs`, hold
    until `decay_start_epoch`, fall linearly."""
    hold_epochs: float = 0.0
    """Epochs before the decay begins."""
    warm_up: bool = False
    """Rise linearly from zero during `hold_epochs`, rather than hold `lr`."""
    start_lr: float = 0.0
    """warmup-stable-decay: learning rate of the first step."""
    decay_start_epoch: float = 0.0
    """warmup-stable-decay: epoch at which the decay begins."""
    decay_end_epoch: float = 0.0
    """Epoch at which `final_lr` is reached; no schedule depends on --max-steps."""
    round_epochs: bool = True
    """Round epochs to the nearest step, as RAE does, rather than cut them to whole steps, as RAEv2 does."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov's)."""
    safety: float = 1.05
    """Muon divides singular values by this before each polynomial; RAEv2's own value is not public."""
    safety_on_last: bool = True
    """Divide before the last polynomial too; the public packages with 1.01 and 1.02 did not."""
    half: bool | None = None
    """Muon iterates in float16 on a direction rounded to bfloat16, as the public package. None: on CUDA only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay_matrices_only: bool = False
    """Leave biases, norms and learned tokens out of the weight decay."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""

    def __post_init__(self) -> None:
        """Refuse what no schedule can mean."""
        if self.lr <= 0:
            raise UsageError(f"--optimizer.lr must be positive; got {self.lr}")
        if self.safety < 1:
            raise UsageError(
                f"--optimizer.safety must be at least 1, or Muon's iteration may diverge; got {self.safety}"
            )
        if self.schedule == "warmup-stable-decay":
            if not self.hold_epochs <= self.decay_start_epoch < self.decay_end_epoch:
                raise UsageError(
                    "a warmup-stable-decay schedule needs --optimizer.hold-epochs ≤ --optimizer.decay-start-epoch < "
                    f"--optimizer.decay-end-epoch; got {self.hold_epochs:g}, {self.decay_start_epoch:g} and "
                    f"{self.decay_end_epoch:g}"
                )
        elif self.schedule != "constant" and self.decay_end_epoch <= self.hold_epochs:
            raise UsageError(
                f"a {self.schedule} schedule decays from --optimizer.hold-epochs to a later "
                f"--optimizer.decay-end-epoch; got {self.hold_epochs:g} and {self.decay_end_epoch:g}"
            )


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Flow matching: what is predicted, which times are trained on, and how often the label is withheld."""

    prediction: Prediction = "velocity"
    """What the network puts out: the velocity, or x, the data. The loss is the velocity's error in both cases."""
    time_floor: float = 0.0
    """Least time that data is divided by to become a velocity, in training and sampling; x needs one above 0."""
    base_weight: float = 1.0
    """Weight of the loss of the base output, where the network has one."""
    latest_time: float = 0.999
    """Latest time that is drawn, before the shift, as RAE's; 1 cuts nothing off, as RAEv2."""
    time_distribution: Literal["uniform", "logit-normal"] = "logit-normal"
    """Distribution of the time t before the shift; t = 0 is data, t = 1 is noise."""
    mu: float = 0.0
    """Mean of the logit-normal distribution's logit."""
    sigma: float = 1.0
    """Standard deviation of the logit-normal distribution's logit."""
    shift_base: int = 4096
    """The time shift is sqrt(numbers in a latent / this)."""
    label_dropout: float = 0.1
    """Probability of training a sample without its label, which classifier-free guidance needs."""

    def __post_init__(self) -> None:
        """Refuse what no loss can mean."""
        if self.prediction == "x" and not 0 < self.time_floor < 1:
            raise UsageError(
                "--flow.prediction x divides by the time and needs --flow.time-floor between 0 and 1, RAEv2's is 0.05; "
                f"got {self.time_floor}"
            )
        if not 0 <= self.time_floor < 1:
            raise UsageError(f"--flow.time-floor must be at least 0 and below 1; got {self.time_floor}")
        if not 0 < self.latest_time <= 1:
            raise UsageError(f"--flow.latest-time must be above 0 and at most 1; got {self.latest_time}")


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """Align image tokens within the network with another encoder's (REPA); with conditioning tokens only.

    RAEv2 ships with it off: its base output takes the same place.
    """

    field: str | None = None
    """Added field of the store (`pipeline add-field`) whose tokens are the target; None: no alignment."""
    weight: float = 0.5
    """Weight of the mean squared error."""
    depth: int = 8
    """Deep blocks after which tokens are aligned."""
    hidden: int = 2048
    """Hidden width of the projection."""


@dataclass(frozen=True, kw_only=True)
class TokenNoise:
    """Noise added to the raw tokens a decoder learns from, so that it tolerates a generator's errors."""

    tau: float = 0.8
    """Scale of the standard deviation drawn for each sample; 0: no noise."""
    distribution: Literal["uniform", "half-normal"] = "uniform"
    """uniform: U(0, tau), as published decoders were trained; half-normal: |N(0, tau²)|, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """The discriminator a decoder is trained against; epochs are floor(rows / global batch) steps."""

    size: Literal["S_8", "S_16", "B_16"] = "S_8"
    """Frozen DINO it looks through."""
    kernel_size: int = 9
    """Tokens its heads' middle layer sees at once."""
    loss: Literal["hinge", "non-saturating"] = "hinge"
    """What the discriminator minimises."""
    weight: float = 0.75
    """Share of the adversarial loss, after it is balanced with the reconstruction."""
    discriminator_start_epoch: Annotated[float, arg(aliases=["--adversary.learns-from-epoch"])] = 6.0
    """Epoch from which the discriminator is trained."""
    adversarial_start_epoch: Annotated[float, arg(aliases=["--adversary.plays-from-epoch"])] = 8.0
    """Epoch from which the decoder is trained against it."""
    augmentation: float = 1.0
    """Probability of each augmentation of what the discriminator learns from."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimizer, whose schedule counts its own updates."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Settings that all trainers share."""

    store: str | Path | tuple[str, ...] = field(default="data/store", metadata=FREE)
    """Store to train from: a folder or a URL; several stores of one encoder are mixed."""
    follow_links: bool = field(default=False, metadata=FREE)
    """Read objects that are behind links inside the store; otherwise a store with links is refused."""
    store_weights: tuple[float, ...] = field(default=(), metadata=FREE)
    """Shares of several stores in the stream of samples, one a store; their sum need not be 1. None given: equal."""
    store_schedule: tuple[str, ...] = field(default=(), metadata=FREE)
    """Later shares, each as STEP:WEIGHT,WEIGHT,... for the step from which they hold."""
    store_mix: Literal["sample", "step"] = field(default="sample", metadata=FREE)
    """Several stores: draw one for every sample, or one for all samples of a step."""
    epoch_samples: int | None = None
    """Samples of an epoch of the schedules. None: the training images of all stores; with --store-mix step the mean of
    the stores, as RAEv2 counts."""
    cache: Path | None = field(default=None, metadata=FREE)
    """Folder of this machine that keeps what is read of a store on a server; other runs may use it too."""
    cache_bytes: int | None = field(default=None, metadata=FREE)
    """Bytes that --cache may hold."""
    out: Path | None = field(default=None, metadata=FREE)
    """Directory of the run; run the same command again to continue it. None: runs/PRESET."""
    varies: Annotated[str | None, Suppress] = field(default=None, metadata=FREE)
    """The config.json whose settings the run was begun with, noted for `python -m train.compare`."""
    varies_in: Annotated[tuple[str, ...], Suppress] = field(default=(), metadata=FREE)
    """What the command line changed of these settings, each as "NAME: BEFORE → NOW"."""
    max_steps: int = field(default=100_000, metadata=FREE)
    """Optimizer steps the run ends at; raise it to train a finished run longer."""
    global_batch_size: int = 1024
    """Samples an optimizer step learns from, over all processes."""
    micro_batch_size: int | None = field(default=None, metadata=FREE)
    """Most samples a process computes at once; gradients of several are summed. None: its whole share."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and every draw. Several seeds: a run each, one after
    another, in OUT/seed-SEED."""
    held_out: int = 0
    """Images, drawn by the seed, that are never trained on; schedules count the others."""
    views: tuple[str, ...] | None = None
    """Views to train on. None: center and flip for a DiT; the crops, or else center, for a decoder."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer and schedule of the learning rate."""
    ema_rates: tuple[float, ...] = (0.9995,)
    """Rates of the averaged weights, at least one; the first is the one snapshots and samples use."""
    init_from: Path | None = None
    """Snapshot, ours or a published file, whose weights the run starts from."""
    precision: Precision | None = None
    """Arithmetic of the network: fp32, tf32 products, or bf16 autocast. None: bf16 on CUDA, fp32 on a CPU."""
    compile: bool | None = None
    """Compile the network, and what draws the noise. None: on CUDA only."""
    one_pass: bool = field(default=False, metadata=FREE)
    """Clip, step AdamW and move the averages in one compiled pass over the weights instead of three: 40 bytes of memory
    traffic a parameter instead of 52, other rounding. Not measured on a GPU yet."""
    activation_checkpointing: bool = field(default=False, metadata=FREE)
    """Recompute each block's activations in the backward pass: less memory, about a third more computing."""
    sharding: Literal["ddp", "fsdp"] = field(default="ddp", metadata=FREE)
    """Several processes: ddp keeps all weights in each; fsdp spreads them (CUDA only)."""
    log_every: int = field(default=50, metadata=FREE)
    """Steps between two lines of metrics.jsonl, each the mean over the steps since the last."""
    checkpoint_every: int = field(default=1000, metadata=FREE)
    """Steps between two checkpoints; one is written at the end of every run as well."""
    keep_checkpoints: int = field(default=2, metadata=FREE)
    """Newest checkpoints kept."""
    snapshot_every: int = field(default=1000, metadata=FREE)
    """Steps between two updates of snapshots/latest.safetensors."""
    milestone_every: int | None = field(default=None, metadata=FREE)
    """Steps between two snapshots that are kept for ever. None: none are kept."""
    sample_every: int | None = field(default=None, metadata=FREE)
    """Steps between two sheets of samples. None: none."""
    max_bad_steps: int = field(default=20, metadata=FREE)
    """Steps with a non-finite loss or gradient (they change nothing) after which the run stops."""
    threads: int = field(default=2, metadata=FREE)
    """Reading threads a process."""
    resident: bool | None = field(default=None, metadata=FREE)
    """Hold all tokens that are trained on in the device's memory, on a CPU in the machine's, in every process: compact
    latents then cost no feeding. None: where they leave half of what is free beside the network, on a CPU three
    quarters, and the run takes as many samples as are held."""
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = field(default="auto", metadata=FREE)
    """Where curves go besides metrics.jsonl. auto: TensorBoard if it is installed."""
    allow_change: tuple[str, ...] = field(default=(), metadata=FREE)
    """Fixed settings, by name, that may differ from the run that is continued."""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        self._require_at_least_one(
            *(
                "max_steps",
                "global_batch_size",
                "epoch_samples",
                "micro_batch_size",
                "log_every",
                "checkpoint_every",
            ),
            *("keep_checkpoints", "snapshot_every", "milestone_every", "sample_every", "threads"),
        )
        if self.held_out < 0:
            raise UsageError(f"--held-out must be 0 or more; got {self.held_out}")
        if self.one_pass and self.optimizer.kind != "adamw":
            raise UsageError(
                f"--one-pass is for AdamW and --optimizer.kind is {self.optimizer.kind}; leave it out, or choose adamw"
            )
        if not self.ema_rates or not all(0 <= rate < 1 for rate in self.ema_rates):
            raise UsageError(f"--ema-rates needs one rate or more, each in [0, 1); got {self.ema_rates}")

    def _require_at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


@dataclass(frozen=True, kw_only=True)
class DiTSettings(TrainerSettings):
    """Train a diffusion transformer on a store's tokens."""

    model: DiTNetwork
    """Shape of the network."""
    objective: Objective = "velocity"
    """What the network learns to predict. velocity: the velocity from data to noise (flow matching); mid-training:
    average velocities along a teacher's trajectories; mean-flow: average velocities, with --teacher or without."""
    teacher: Path | None = field(default=None, metadata=FREE)
    """Snapshot, ours or a published file, of the network that mid-training and mean-flow distil."""
    teacher_guidance: TeacherGuidance = field(default_factory=TeacherGuidance)
    """Guidance of the teacher."""
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's matrices; bfloat16 halves its memory and computes it in bfloat16."""
    mean_flow: MeanFlowSettings = field(default_factory=MeanFlowSettings)
    """The objective mean-flow."""
    mid_training: MidTrainingSettings = field(default_factory=MidTrainingSettings)
    """The objective mid-training."""
    end_time_init: Literal["zero", "published"] = "zero"
    """Values of the five end-time weights where the initial weights have none; zero: the network begins as its
    teacher; published: PyTorch's defaults."""
    flow: FlowSettings = FlowSettings()
    """Flow matching."""
    repa: AlignmentSettings = AlignmentSettings()
    """Alignment with another encoder."""
    statistics: Path | None = None
    """Published statistics (stat.pt or safetensors with var and, if any, mean) instead of the store's own."""
    head_residual: Literal["float32", "bfloat16"] = field(default="float32", metadata=FREE)
    """Residual stream of the wide head with --precision bf16. bfloat16: as the reference's; half the memory traffic of
    a small part of the step, more rounding. Not measured on a GPU yet."""
    train_tables: bool = False
    """Train the position table and the Fourier frequencies too, as the reference's script happens to do."""
    decoder: Path | None = field(default=None, metadata=FREE)
    """Decoder for --sample-every and --fid-every: a snapshot, a published file or diffusers' folder."""
    compressor: Path | None = field(default=None, metadata=FREE)
    """Compressor that made the store's latents, where one did: makes tokens of them for --decoder."""
    fid_every: int | None = field(default=None, metadata=FREE)
    """Steps between two FIDs of a few unguided samples, comparable within a run. None: none."""
    fid_samples: int = field(default=5000, metadata=FREE)
    """Samples of each such FID, shared by the processes; the fewer, the larger the number."""
    fid_reference: Path | None = field(default=None, metadata=FREE)
    """What --fid-every compares with: image folder, store, .npz of images, or published statistics."""
    fid_weights: str = field(default="public", metadata=FREE)
    """Inception weights of --fid-every: public, a file, or random:SEED."""

    @property
    def learns_jumps(self) -> bool:
        """Whether the network has an end time and is sampled in jumps."""
        return self.objective in JUMPING

    def __post_init__(self) -> None:
        """Refuse an FID without what it needs, and a residual stream for a head that is not there."""
        super().__post_init__()
        if self.head_residual == "bfloat16" and self.model.head_width is None:
            raise UsageError(
                "--head-residual bfloat16 is for networks with a wide head, and this one has --model.head-width None; "
                "leave it out"
            )
        self._require_at_least_one("fid_every")
        if self.fid_samples < 2:
            raise UsageError(f"--fid-samples must be at least 2, for a covariance; got {self.fid_samples}")
        if self.fid_every is not None and (self.fid_reference is None or not self.fid_reference.exists()):
            raise UsageError(
                "--fid-every needs images to compare with: give --fid-reference, a folder, a store or an .npz file; "
                f"found {self.fid_reference}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(TrainerSettings):
    """Train a decoder that reconstructs a store's images from its tokens."""

    model: DecoderNetwork
    """Shape of the network."""
    noise: TokenNoise = TokenNoise()
    """Noise on the tokens."""
    pool: Literal["2x2", "2x4", "4x4"] | None = None
    """Learn a map of windows of tokens, rows x columns, to one latent each together with the decoder; `pipeline
    add-field --compressor` then writes the latents, and this decoder decodes them."""
    compressor: Path | None = None
    """Learn from what this compressor leaves of the tokens, so that images of its latents become better."""
    perceptual: Literal["lpips", "none"] = "none"
    """Perceptual distance added to L1."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""
    adversarial: bool = False
    """Train against a discriminator as well."""
    adversary: AdversarySettings = AdversarySettings()
    """The discriminator."""
    perceptual_weights: Path | None = field(default=None, metadata=FREE)
    """VGG16's weights (torchvision's vgg16-397923af.pth). None: torch's cache, else downloaded."""
    discriminator_weights: Path | None = field(default=None, metadata=FREE)
    """DINO's weights (dino_deitsmall8_pretrain.pth and the like). None: torch's cache, else downloaded."""
    evaluate_every: int | None = field(default=None, metadata=FREE)
    """Steps between two measurements (PSNR, SSIM, and LPIPS if it is trained with) on images not trained on."""
    evaluation_store: str | Path | None = field(default=None, metadata=FREE)
    """Store of the same encoder to measure on. None: the --held-out images."""
    evaluation_images: int = field(default=256, metadata=FREE)
    """Most images measured, evenly spread over those there are."""

    def __post_init__(self) -> None:
        """Refuse measurements on images there are none of."""
        super().__post_init__()
        self._require_at_least_one("evaluate_every", "evaluation_images")
        if self.pool is not None and self.compressor is not None:
            raise UsageError("--pool and --compressor are two kinds of compact latents; choose one")
        if self.evaluate_every is not None and self.evaluation_store is None and not self.held_out:
            raise UsageError(
                "--evaluate-every needs images that are not trained on: leave some out with --held-out N, "
                "or give another store with --evaluation-store STORE"
            )


@dataclass(frozen=True, kw_only=True)
class CompressorHalf:
    """Shape of one half of a flat compressor."""

    width: int
    """Width of the residual stream."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads a block."""
    mlp_width: int
    """Hidden width of the SwiGLU MLPs."""


@dataclass(frozen=True, kw_only=True)
class CompressorNetwork:
    """Shape of a flat compressor; the number of tokens and their width come from the store."""

    num_latents: int
    """Latents K of an image, a sequence without a grid."""
    latent_width: int
    """Channels F of a latent."""
    encoder: CompressorHalf
    """Tokens to latents."""
    decoder: CompressorHalf
    """Latents to tokens."""


@dataclass(frozen=True, kw_only=True)
class CompressorSettings(TrainerSettings):
    """Train a flat compressor on a store's tokens: compact latents of them, and the tokens back."""

    model: CompressorNetwork
    """Shape of the network."""
    evaluate_every: int | None = field(default=None, metadata=FREE)
    """Steps between two measurements on the --held-out images: reconstruction error of their tokens, share of
    collapsed latents, and with --decoder what the images have lost. None: none."""
    evaluation_images: int = field(default=256, metadata=FREE)
    """Most images measured, evenly spread over those there are."""
    decoder: Path | None = field(default=None, metadata=FREE)
    """Decoder of the tokens' encoder, for what the compressor leaves of them: for --sample-every, and PSNR, SSIM
    and --rfid-weights of --evaluate-every."""
    rfid_weights: str | None = field(default=None, metadata=FREE)
    """Measure rFID as well: Inception weights, public, a file, or random:SEED. None: it is not measured."""

    def __post_init__(self) -> None:
        """Refuse measurements without what they need."""
        super().__post_init__()
        self._require_at_least_one("evaluate_every", "evaluation_images")
        if self.evaluate_every is not None and self.held_out < 2:
            raise UsageError(
                "--evaluate-every needs images that are not trained on, at least 2: leave some out with --held-out N; "
                f"got {self.held_out}"
            )
        if self.sample_every is not None and self.decoder is None:
            raise UsageError("--sample-every needs a decoder: give --decoder SNAPSHOT")
        if self.rfid_weights is not None and (self.decoder is None or self.evaluate_every is None):
            raise UsageError("--rfid-weights is for --evaluate-every with --decoder SNAPSHOT; give both")
        if self.sharding == "fsdp":
            raise UsageError("a compressor fits into one device; leave --sharding at ddp")


Settings = DiTSettings | DecoderSettings | CompressorSettings
