"""Named settings: one aligned row a preset, each with the source of its numbers. No torch.

`python train/dit.py NAME` and `python train/decoder.py NAME` start from a row; every field can be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, TypeVar

from shards import UsageError
from train.models.config import (
    DECODER_MLP_WIDTHS,
    DECODER_SIZES,
    DH_HEAD,
    DIT_SIZES,
    RAEV2_BASE_DEPTHS,
    RAEV2_SIZES,
)
from train.settings.config import (
    AdversarySettings,
    DecoderNetwork,
    DecoderSettings,
    DiTNetwork,
    DiTSettings,
    FlowSettings,
    Objective,
)
from train.settings.config import OptimizerSettings as Adam
from train.settings.few_step import MeanFlowSettings, MidTrainingSettings

STEPS_80_EPOCHS = 80 * 1251
STEPS_800_EPOCHS = 800 * 1251
STEPS_FLAT = 1_000_911  # ⌊1,281,167 · 800 / 1024⌋
STEPS_DECODER = 16 * 2502
"""An ImageNet epoch has floor(1,281,167 / 1024) = 1251 steps; a decoder's, at 512 images, 2502."""


class Training(NamedTuple):
    """How a preset is trained, whatever its size."""

    optimizer: Adam
    ema_rate: float
    batch: int
    steps: int
    flow: FlowSettings = FlowSettings()


class DiTRow(NamedTuple):
    """A preset of train/dit.py: network, side of its token grid, how it is trained, and its source."""

    kind: Literal["dit", "dit-dh", "raev2", "flat"]
    size: str
    grid: int | None
    recipe: Training
    source: str


class Stage(NamedTuple):
    """A stage of few-step generation: its objective, and how it is trained, by the network's size."""

    objective: Objective
    on_32: Training
    """On a grid of 32×32."""
    other: Training
    """On a grid of 16×16, and on fewer latents."""
    tiny: Training


class DecoderRow(NamedTuple):
    """A preset of train/decoder.py: size, side of the grid, patch, training, its source, output, mixing of stores."""

    size: str
    grid: int | None
    patch: int | None
    recipe: Training
    source: str
    output: Literal["normalised", "image"] = "normalised"
    store_mix: Literal["sample", "step"] = "sample"


_DECAY = Adam(lr=2e-4, final_lr=2e-5, schedule="linear", hold_epochs=40, decay_end_epoch=800)
_MUON = replace(_DECAY, kind="muon", hold_epochs=25, decay_end_epoch=50, round_epochs=False)
_COSINE = Adam(schedule="cosine", hold_epochs=1, decay_end_epoch=16, warm_up=True, clip_norm=None)

# fmt: off
#                    optimizer                               ema     batch  steps
_TINY      = Training(Adam(lr=2e-3),                         0.995,  32,    2000,
                    FlowSettings(shift_base=512))  # 4096 would leave small latents unshifted
_DH        = Training(_DECAY,                                0.9995, 1024,  STEPS_800_EPOCHS)
_DH_OLD    = Training(replace(_DECAY, warm_up=True),         0.9995, 1024,  STEPS_800_EPOCHS,
                    FlowSettings(time_distribution="uniform"))
_LIGHTNING = Training(Adam(lr=2e-4),                         0.9999, 1024,  STEPS_80_EPOCHS)
_FLAT      = Training(Adam(lr=2e-4, weight_decay=1e-4),      0.9995, 1024,  STEPS_FLAT,
                    FlowSettings(time_distribution="uniform", latest_time=1.0))
_RAEV2     = Training(_MUON,                                 0.9995, 1024,  STEPS_80_EPOCHS,
                    FlowSettings(prediction="x", time_floor=0.05, latest_time=1.0))
_RAEV2_TINY = Training(Adam(kind="muon", lr=5e-3),           0.995,  32,    2000,
                    FlowSettings(prediction="x", time_floor=0.05, latest_time=1.0, shift_base=512))
_STAGE1    = Training(_COSINE,                               0.9978, 512,   STEPS_DECODER)
_TABLE12   = Training(replace(_COSINE, betas=(0.5, 0.9)),    0.9978, 512,   STEPS_DECODER)

_OURS  = "ours: small images on a CPU"
_YAML  = "bytetriper/RAE@a4d18c4 configs/stage2/training"
_SIZE  = "sizes of arXiv 2212.09748, recipe of dit-dh-xl-256"
_512   = "arXiv 2510.11690 section 6, recipe of dit-dh-xl-256"
_OLD   = "bytetriper/RAE@d13c4be: uniform times, rate ramp"
_PLAIN = "arXiv 2510.11690 section 4: LightningDiT recipe"
_V2    = "nanovisionx/RAEv2@8a0d238: Muon, x, base output"
_V2_OURS = "ours: RAEv2's recipe at another size"
_FLATD = "noctrog/flatdino@cdd398f dit{S,B,L,XL}-norm"
_POOL  = "PoolDINO, 2026: x, internal guidance, 80 epochs"
_DEC   = "bytetriper/RAE@a4d18c4 configs/stage1/training"
_V2_DEC = "nanovisionx/RAEv2@8a0d238: the output is the image"
_V2_GENERAL = "arXiv 2605.18324, general decoder: several --store, one a step"
_V2_DEC_OURS = "ours: RAEv2's recipe at another size"
_T12   = "arXiv 2510.11690 table 12: betas 0.5, 0.9"
_T9    = "arXiv 2510.11690 table 9: upsampling decoder"

DIT_PRESETS = {
    #                               network   size    grid  recipe      source
    "dit-dh-tiny":           DiTRow("dit-dh", "tiny", None, _TINY,      _OURS),
    "dit-tiny":              DiTRow("dit",    "tiny", None, _TINY,      _OURS),
    "dit-dh-s-256":          DiTRow("dit-dh", "s",    16,   _DH,        _YAML),
    "dit-dh-b-256":          DiTRow("dit-dh", "b",    16,   _DH,        _SIZE),
    "dit-dh-l-256":          DiTRow("dit-dh", "l",    16,   _DH,        _SIZE),
    "dit-dh-xl-256":         DiTRow("dit-dh", "xl",   16,   _DH,        _YAML),
    "dit-dh-xl-256-uniform": DiTRow("dit-dh", "xl",   16,   _DH_OLD,    _OLD),
    "dit-dh-s-512":          DiTRow("dit-dh", "s",    32,   _DH,        _512),
    "dit-dh-b-512":          DiTRow("dit-dh", "b",    32,   _DH,        _512),
    "dit-dh-l-512":          DiTRow("dit-dh", "l",    32,   _DH,        _512),
    "dit-dh-xl-512":         DiTRow("dit-dh", "xl",   32,   _DH,        _512),
    "raev2-tiny":            DiTRow("raev2",  "tiny", None, _RAEV2_TINY, _OURS),
    "raev2-s-256":           DiTRow("raev2",  "s",    16,   _RAEV2,     _V2_OURS),
    "raev2-b-256":           DiTRow("raev2",  "b",    16,   _RAEV2,     _V2_OURS),
    "raev2-l-256":           DiTRow("raev2",  "l",    16,   _RAEV2,     _V2_OURS),
    "raev2-xl-256":          DiTRow("raev2",  "xl",   16,   _RAEV2,     _V2),
    "raev2-pool-s":          DiTRow("raev2",  "s",    None, _RAEV2,     _V2_OURS),
    "raev2-pool-b":          DiTRow("raev2",  "b",    None, _RAEV2,     _V2_OURS),
    "raev2-pool-l":          DiTRow("raev2",  "l",    None, _RAEV2,     _V2_OURS),
    "raev2-pool-xl":         DiTRow("raev2",  "xl",   None, _RAEV2,     _POOL),
    "dit-flat-s":            DiTRow("flat",   "s",    None, _FLAT,      _FLATD),
    "dit-flat-b":            DiTRow("flat",   "b",    None, _FLAT,      _FLATD),
    "dit-flat-l":            DiTRow("flat",   "l",    None, _FLAT,      _FLATD),
    "dit-flat-xl":           DiTRow("flat",   "xl",   None, _FLAT,      _FLATD),
    "dit-s-256":             DiTRow("dit",    "s",    16,   _LIGHTNING, _PLAIN),
    "dit-b-256":             DiTRow("dit",    "b",    16,   _LIGHTNING, _PLAIN),
    "dit-l-256":             DiTRow("dit",    "l",    16,   _LIGHTNING, _PLAIN),
    "dit-xl-256":            DiTRow("dit",    "xl",   16,   _LIGHTNING, _PLAIN),
    "dit-s-512":             DiTRow("dit",    "s",    32,   _LIGHTNING, _PLAIN),
    "dit-b-512":             DiTRow("dit",    "b",    32,   _LIGHTNING, _PLAIN),
    "dit-l-512":             DiTRow("dit",    "l",    32,   _LIGHTNING, _PLAIN),
    "dit-xl-512":            DiTRow("dit",    "xl",   32,   _LIGHTNING, _PLAIN),
}

DECODER_PRESETS = {
    #                                size    grid  patch recipe    source
    "decoder-tiny":      DecoderRow("tiny", None, None, _TINY,    _OURS),
    "decoder-b":         DecoderRow("b",    None, 16,   _STAGE1,  _DEC),
    "decoder-l":         DecoderRow("l",    None, 16,   _STAGE1,  _DEC),
    "decoder-xl":        DecoderRow("xl",   None, 16,   _STAGE1,  _DEC),
    "decoder-xl-paper":  DecoderRow("xl",   None, 16,   _TABLE12, _T12),
    "decoder-xl-512":    DecoderRow("xl",   32,   16,   _STAGE1,  _DEC),
    "decoder-xl-512-up": DecoderRow("xl",   16,   32,   _STAGE1,  _T9),
    "raev2-decoder-b":   DecoderRow("b",    None, 16,   _STAGE1,  _V2_DEC_OURS, "image"),
    "raev2-decoder-l":   DecoderRow("l",    None, 16,   _STAGE1,  _V2_DEC_OURS, "image"),
    "raev2-decoder-xl":  DecoderRow("xl",   None, 16,   _STAGE1,  _V2_DEC, "image"),
    "raev2-decoder-xl-general": DecoderRow("xl", None, 16, _STAGE1, _V2_GENERAL, "image", "step"),
}
# fmt: on

FLAT_MLP_WIDTHS = {"l": 2731}
"""Hidden width of FlatDINO's generators where it is not RAE's. Source: noctrog/flatdino@cdd398f models/dit.py."""

_TINY_NETWORKS = {
    "dit-dh": DiTNetwork(width=96, depth=4, num_heads=4, head_width="auto", head_num_heads=4),
    "dit": DiTNetwork(width="auto", depth=6, num_heads=4),
    "raev2": DiTNetwork(
        width=96,
        depth=4,
        num_heads=4,
        head_width="auto",
        head_num_heads=4,
        conditioning="tokens",
        base_depth=2,
    ),
}

# fmt: off
_CMT_256  = Training(Adam(lr=1e-4), 0.999,  8,   10_000)
_MFD_256  = Training(Adam(lr=1e-4), 0.9999, 256, 250_000)
_MFD_512  = Training(Adam(lr=1e-4), 0.9995, 128, 250_000)
_MFT_512  = Training(Adam(lr=1e-4), 0.9995, 128, 100_000)
_CMT_TINY = Training(Adam(lr=1e-3), 0.99,   8,   500)
_MFD_TINY = Training(Adam(lr=4e-4), 0.995,  32,  1000)

STAGES = {
    #             objective       32×32      other      tiny
    "cmt": Stage("mid-training", _CMT_256,  _CMT_256,  _CMT_TINY),
    "mfd": Stage("mean-flow",    _MFD_512,  _MFD_256,  _MFD_TINY),
    "mft": Stage("mean-flow",    _MFT_512,  _MFD_256,  _MFD_TINY),
}
# fmt: on
"""Stages of few-step generation; `NAME-STAGE` is that stage of the network of the preset NAME (`_stage_settings`).

Rate, averages and batches are published, but for fine-tuning at 256 pixels, for which there is no script, and the tiny
ones; numbers of steps are ours. Source: github:sony/mf-rae src/train_{cmt,cmt_512,mfd,mfd_512,mft_512}.py and
configs at fffc544.
"""

_MID_TRAINING = MidTrainingSettings(pairs=64)
_MID_TRAINING_ON_32 = MidTrainingSettings(pairs=8)
_MID_TRAINING_TINY = MidTrainingSettings(pairs=16)
"""Source of the first two: as `STAGES`; of the tiny one: ours."""

_MEAN_FLOW_TINY = MeanFlowSettings(share=0.5, power=0.75)
"""Ours: short runs learn jumps sooner with it than with the published numbers (docs/few-step.md)."""

DIT_DEFAULT = "dit-dh-xl-256"
DECODER_DEFAULT = "decoder-xl"


def dit_settings(name: str) -> DiTSettings:
    """Return the settings of a preset of train/dit.py, or of a stage of few-step generation of its network.

    Raises:
        UsageError: there is no preset of this name.
    """
    base, _, stage = name.rpartition("-")
    if base in DIT_PRESETS and stage in STAGES:
        return _stage_settings(DIT_PRESETS[base], dit_settings(base), STAGES[stage])
    row = _row(DIT_PRESETS, name)
    grid = None if row.grid is None else (row.grid, row.grid)
    if row.size == "tiny":
        model = _TINY_NETWORKS[row.kind]
    elif row.kind == "raev2":
        model = DiTNetwork(
            **RAEV2_SIZES[row.size]._asdict(),
            head_width=DH_HEAD.width,
            conditioning="tokens",
            base_depth=RAEV2_BASE_DEPTHS[row.size],
            grid=grid,
        )
    elif row.kind == "flat":
        stack = DIT_SIZES[row.size]
        model = DiTNetwork(**stack._asdict(), mlp_width=FLAT_MLP_WIDTHS.get(row.size), positions="sequence")
    else:
        stack = DIT_SIZES[row.size]
        head_width = DH_HEAD.width if row.kind == "dit-dh" else None
        model = DiTNetwork(**stack._asdict(), head_width=head_width, grid=grid)
    return DiTSettings(
        model=model,
        flow=row.recipe.flow,
        optimizer=row.recipe.optimizer,
        ema_rates=(row.recipe.ema_rate,),
        global_batch_size=row.recipe.batch,
        max_steps=row.recipe.steps,
        # RAEv2 trains on one view, without its mirror image.
        views=("center",) if row.kind == "raev2" and grid is not None else None,
    )


def _stage_settings(row: DiTRow, base: DiTSettings, stage: Stage) -> DiTSettings:
    """Return a stage's settings with the preset's network, prediction, grid and shift base."""
    if row.size == "tiny":
        training, mid_training, mean_flow = stage.tiny, _MID_TRAINING_TINY, _MEAN_FLOW_TINY
    elif row.grid == 32:
        training, mid_training, mean_flow = stage.on_32, _MID_TRAINING_ON_32, MeanFlowSettings()
    else:
        training, mid_training, mean_flow = stage.other, _MID_TRAINING, MeanFlowSettings()
    return replace(
        base,
        objective=stage.objective,
        flow=replace(base.flow, time_distribution="uniform", latest_time=0.999, label_dropout=0.1),
        mid_training=mid_training,
        mean_flow=mean_flow,
        optimizer=training.optimizer,
        ema_rates=(training.ema_rate,),
        global_batch_size=training.batch,
        max_steps=training.steps,
    )


def decoder_settings(name: str) -> DecoderSettings:
    """Return the settings of a preset of train/decoder.py.

    Raises:
        UsageError: there is no preset of this name.
    """
    row = _row(DECODER_PRESETS, name)
    grid = None if row.grid is None else (row.grid, row.grid)
    if row.size == "tiny":
        model = DecoderNetwork(width=192, depth=3, num_heads=4, mlp_width=768, output=row.output)
    else:
        stack, mlp_width = DECODER_SIZES[row.size], DECODER_MLP_WIDTHS[row.size]
        model = DecoderNetwork(
            **stack._asdict(), mlp_width=mlp_width, patch_size=row.patch, grid=grid, output=row.output
        )
    return DecoderSettings(
        model=model,
        optimizer=row.recipe.optimizer,
        ema_rates=(row.recipe.ema_rate,),
        global_batch_size=row.recipe.batch,
        max_steps=row.recipe.steps,
        perceptual="none" if row.size == "tiny" else "lpips",
        adversarial=row.size != "tiny",
        adversary=AdversarySettings(optimizer=row.recipe.optimizer),
        store_mix=row.store_mix,
    )


class HasSource(Protocol):
    """A row of presets."""

    @property
    def source(self) -> str:
        """Its source."""


def preset_list(rows: Mapping[str, HasSource]) -> str:
    """Return the presets' names and sources, a line each, for --help."""
    lines = [f"  {name:<22} {row.source}" for name, row in rows.items()]
    if rows is DIT_PRESETS:
        lines.append(
            f"  NAME-{{{','.join(STAGES)}}}     few-step generation: a stage of any of these, docs/few-step.md"
        )
    return "\n".join(lines)


_Row = TypeVar("_Row", DiTRow, DecoderRow)


def _row(rows: dict[str, _Row], name: str) -> _Row:
    if name not in rows:
        stages = f", and each of them with -{', -'.join(STAGES)}" if rows is DIT_PRESETS else ""
        raise UsageError(f"no preset is called {name!r}; there are {', '.join(rows)}{stages}")
    return rows[name]
