"""Published evaluations: what they fix, and the numbers they gave. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from eval.settings import (
    ADM_METRICS,
    GridKind,
    Guidance,
    LabelRule,
    Precision,
    ProtocolName,
    SamplerName,
    SetMetric,
)


class Sampler(NamedTuple):
    """A sampler by name: time grid, number of its points, and how steps are taken."""

    kind: GridKind
    points: int
    method: str


# The published PyTorch code walks 50 points, so 49 evaluations, and stops short of t = 0; the authors' JAX
# code takes 50 steps to t = 0. Source: github:bytetriper/RAE at a4d18c4, src/stage2/transport/integrators.py;
# github:willisma/diffuse_nnx configs/rae_imagenet.py.
SAMPLERS: dict[SamplerName, Sampler] = {
    "euler-50": Sampler("published", 50, "euler"),
    "euler-50-to-zero": Sampler("to-zero", 51, "euler"),
    "euler-100-to-zero": Sampler("to-zero", 101, "euler"),
    # Source: github:sony/mf-rae src/sample_ddp_mf_512.py at fffc544.
    "jump-1": Sampler("uniform", 2, "jump"),
    "jump-2": Sampler("uniform", 3, "jump"),
    "jump-4": Sampler("uniform", 5, "jump"),
}


class PublishedRow(NamedTuple):
    """A row of a published table; None where the source gives no number."""

    model: str
    fid: float
    inception_score: float | None
    precision: float | None
    recall: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a published evaluation fixes."""

    image_size: int
    guidance: Guidance
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    precisions: tuple[Precision, ...] = ("fp32", "tf32")
    cautions: tuple[str, ...] = ()
    reference_name: str
    reference_url: str
    published: tuple[PublishedRow, ...]
    num: int = 50_000
    labels: LabelRule = "equal"
    sampler: SamplerName = "euler-50"
    metrics: tuple[SetMetric, ...] = ADM_METRICS


_PAPER = "arXiv 2510.11690, system comparison"
_BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
_REFERENCE_256, _REFERENCE_512 = "VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz"

# fmt: off
_UNGUIDED_256 = (
    #            model                              FID    IS     prec. rec.  source
    PublishedRow("DiT-XL/2",                        9.62,  None,  None, None, _PAPER),
    PublishedRow("SiT-XL/2",                        8.61,  None,  None, None, _PAPER),
    PublishedRow("DDT-XL",                          6.27,  None,  None, None, _PAPER),
    PublishedRow("REPA",                            5.78,  None,  None, None, _PAPER),
    PublishedRow("LightningDiT (VA-VAE)",           2.17,  None,  None, None, _PAPER),
    PublishedRow("REPA-E",                          1.70,  None,  None, None, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 20 epochs",        3.71,  198.7, 0.86, 0.50, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 80 epochs",        2.16,  214.8, 0.82, 0.59, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 800 epochs",       1.51,  242.9, 0.79, 0.63, _PAPER),
)
_GUIDED_256 = (
    PublishedRow("DiT-XL/2",                        2.27,  None,  None, None, _PAPER),
    PublishedRow("SiT-XL/2",                        2.06,  None,  None, None, _PAPER),
    PublishedRow("LightningDiT (VA-VAE)",           1.35,  None,  None, None, _PAPER),
    PublishedRow("REPA",                            1.29,  None,  None, None, _PAPER),
    PublishedRow("DDT-XL",                          1.26,  None,  None, None, _PAPER),
    PublishedRow("REPA-E",                          1.15,  None,  None, None, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 800 epochs",       1.13,  262.6, 0.78, 0.67, _PAPER),
)
_GUIDED_512 = (
    PublishedRow("DDT-XL",                          1.28,  None,  None, None, _PAPER),
    PublishedRow("EDM2-XXL",                        1.25,  None,  None, None, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 400 epochs",       1.13,  259.6, 0.80, 0.63, _PAPER),
)
_V2 = "arXiv 2605.18324, project page"
_V2_UNGUIDED = (
    PublishedRow("RAE DiT-DH-XL, 80 epochs",        2.16,  214.8, 0.82, 0.59, _PAPER),
    PublishedRow("RAE DiT-DH-XL, 800 epochs",       1.51,  242.9, 0.79, 0.63, _PAPER),
    PublishedRow("RAEv2 K=7, 80 epochs",            1.65,  None,  None, None, _V2),
    PublishedRow("RAEv2 K=23, 80 epochs",           3.01,  None,  None, None, _V2),
)
_V2_INTERNAL = (
    PublishedRow("RAE DiT-DH-XL, 800 epochs",       1.13,  262.6, 0.78, 0.67, _PAPER),
    PublishedRow("RAEv2 K=7, 80 epochs",            1.06,  None,  None, None, _V2),
    PublishedRow("RAEv2 K=7, 80 epochs, CFG",       1.49,  None,  None, None, _V2),
    PublishedRow("RAEv2 K=7, AutoGuidance",         1.14,  None,  None, None, _V2),
    PublishedRow("RAEv2 K=23, 80 epochs",           1.25,  None,  None, None, _V2),
)
_MF = "arXiv 2511.13019, abstract"
_MF_TABLE = "arXiv 2511.13019"
_ONE_STEP_256 = (
    PublishedRow("MF-RAE DiT-DH-XL, 1 step",        2.03,  None,  None, None, _MF),
    PublishedRow("MeanFlow-XL/2, 1 step",           3.43,  None,  None, None, _MF_TABLE),
    PublishedRow("CMT MeanFlow-XL/2, 1 step",       3.34,  None,  None, None, "arXiv 2509.24526"),
    PublishedRow("Drift-RAE, 1 step",               1.77,  None,  None, None, "arXiv 2606.15553"),
    PublishedRow("FACM LightningDiT, 1 step",       1.70,  None,  None, None, "arXiv 2507.03738"),
    PublishedRow("RAE DiT-DH-XL, 49 steps",         1.51,  242.9, 0.79, 0.63, _PAPER),
)
_TWO_STEP_256 = (
    PublishedRow("FACM LightningDiT, 2 steps",      1.32,  None,  None, None, "arXiv 2507.03738"),
    PublishedRow("RAE DiT-DH-XL, 49 steps",         1.51,  242.9, 0.79, 0.63, _PAPER),
)
_ONE_STEP_512 = (
    PublishedRow("MF-RAE DiT-DH-XL, 1 step",        3.23,  None,  None, None, _MF),
)
# fmt: on

# Guidance scales: github:bytetriper/RAE at a4d18c4, configs/stage2/sampling.
_UNGUIDED = Protocol(
    image_size=256,
    guidance="none",
    guidance_scale=1.0,
    reference_name=_REFERENCE_256,
    reference_url=f"{_BATCHES}/256/{_REFERENCE_256}",
    published=_UNGUIDED_256,
)
_GUIDED = replace(_UNGUIDED, guidance="autoguidance", guidance_scale=1.42, published=_GUIDED_256)
_AT_512 = replace(
    _UNGUIDED,
    image_size=512,
    reference_name=_REFERENCE_512,
    reference_url=f"{_BATCHES}/512/{_REFERENCE_512}",
    published=(),
)

# Source: github:nanovisionx/RAEv2 configs/stage2/sampling and src/offline_eval.py at 8a0d238.
_V2_PROTOCOL = replace(
    _UNGUIDED,
    sampler="euler-100-to-zero",
    precisions=("bf16",),
    published=_V2_UNGUIDED,
    cautions=(
        "RAEv2's own evaluator is private: which statistics its gFID compares with is not known, here they are ADM's; "
        "it combines guided outputs in bfloat16, here in float32",
    ),
)

PROTOCOLS: dict[ProtocolName, Protocol] = {
    "imagenet256-unguided": _UNGUIDED,
    "imagenet256-guided": _GUIDED,
    "imagenet512-unguided": _AT_512,
    "imagenet512-guided": replace(
        _AT_512, guidance="autoguidance", guidance_scale=1.5, published=_GUIDED_512
    ),
    "raev2-imagenet256-unguided": _V2_PROTOCOL,
    "raev2-imagenet256-internal": replace(
        _V2_PROTOCOL,
        guidance="internal",
        guidance_scale=1.78,
        guidance_interval=(0.1, 1.0),
        published=_V2_INTERNAL,
    ),
    "imagenet256-one-step": replace(_UNGUIDED, sampler="jump-1", published=_ONE_STEP_256),
    "imagenet256-two-step": replace(_UNGUIDED, sampler="jump-2", published=_TWO_STEP_256),
    "imagenet512-one-step": replace(_AT_512, sampler="jump-1", published=_ONE_STEP_512),
    "imagenet512-two-step": replace(_AT_512, sampler="jump-2"),
}
