"""What each part of the system costs on this device: encode, training steps, sampling, decoding.

    python benchmarks/cost.py                                           # GPU: all sizes, 256 and 512 pixels
    python benchmarks/cost.py --sizes s --stages decode --batch-size 2  # something a CPU can do
    python benchmarks/cost.py --count                                   # parameters and FLOPs only, at once

Writes cost.json, cost.md and cost.png. Weights are random: they do not change the cost. Sampling is timed over two
evaluations of the model and scaled to the published 49, of RAEv2 100 with internal guidance. A training step is
forward, backward and the recipe's optimizer in the chosen precision; the decoder's is that of the L1 loss, without
perceptual and adversarial networks. Muon's own products are in the time and not in the FLOPs (optimizer_step.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eval.metrics.device_cost import Cost, measure
from eval.metrics.results import device_name, versions, write_json
from eval.networks.load import autocast, set_precision
from eval.settings import Precision
from pipeline.encoders.encoder import create_encoder
from shards import UsageError
from train.engine.optimizer import make_optimizer
from train.flow.guidance import unguided
from train.flow.integrators import integrate, time_grid
from train.flow.path import interpolate, per_sample_loss, time_shift, velocity_target
from train.models.build import build_model
from train.models.config import (
    DIT_SIZES,
    DiTConfig,
    ModelConfig,
    ViTDecoderConfig,
    decoder_config,
    dit_config,
    dit_dh_config,
    raev2_config,
)
from train.models.cost import flat_half_flops, forward_flops, num_parameters
from train.models.flat import FlatHalf
from train.models.flat_config import FLAT_SIZES, FlatConfig, FlatHalfConfig, FlatHalfShape
from train.settings.config import OptimizerName, OptimizerSettings
from train.settings.presets import FLAT_MLP_WIDTHS
from train.tasks.flat_loss import FlatLoss, flat_terms

Work = Callable[[torch.device, int, Precision], tuple[Callable[[], object], float]]
"""(device, batch size, precision) → a call to time, and how many such calls make the stage."""

STAGES = ("encode", "train-dit", "train-decoder", "train-compressor", "sample", "decode")
ENCODERS = {
    "s": "vit_small_patch14_reg4_dinov2",
    "b": "vit_base_patch14_reg4_dinov2",
    "l": "vit_large_patch14_reg4_dinov2",
}
CLASSES, PATCH = 1000, 16


@dataclass(frozen=True)
class Transformer:
    """A kind of DiT as published: its name, its builder, width of its tokens, evaluations a sample, its optimizer."""

    name: str
    build: Callable[..., ModelConfig]
    token_width: int
    evaluations: int
    optimizer: OptimizerName


TRANSFORMERS = (
    Transformer("dit", dit_config, 768, 49, "adamw"),
    Transformer("dit-dh", dit_dh_config, 768, 49, "adamw"),
    Transformer("raev2", raev2_config, 1024, 100, "muon"),
)
DECODED_WIDTH = 768
FLAT = (32, 128)
"""Number and width of flat latents."""
_FLAT_EVALUATIONS = 50
"""Updates of FlatDINO's sampler."""


@dataclass(frozen=True)
class Case:
    """One row of the table: a stage, a network and an image size."""

    stage: str
    network: str
    image_size: int
    parameters: int
    flops: float
    """For one image: of one forward pass (encode, decode), of all evaluations (sample), of one step (train)."""
    work: Work


def cases(stages: list[str], sizes: list[str], image_sizes: list[int]) -> list[Case]:
    """All rows of these stages, sizes and resolutions that exist."""
    found: list[Case] = []
    for image_size in image_sizes:
        side = image_size // PATCH
        for size in sizes:
            if "encode" in stages and size in ENCODERS:
                found.append(_encode_case(size, image_size))
            for kind in TRANSFORMERS:
                config = kind.build(
                    size, token_width=kind.token_width, grid=(side, side), num_classes=CLASSES
                )
                flops, parameters, name = forward_flops(config), num_parameters(config), f"{kind.name}-{size}"
                if "train-dit" in stages:
                    work = _train_dit(config, kind.optimizer)
                    found.append(Case("train-dit", name, image_size, parameters, 3 * flops, work))
                if "sample" in stages:
                    cost, work = kind.evaluations * flops, _sample(config, kind.evaluations)
                    found.append(Case("sample", name, image_size, parameters, cost, work))
            if image_size == 256:
                found += _flat_cases(stages, size)
            if size in ("b", "l", "xl"):
                decoder = decoder_config(size, token_width=DECODED_WIDTH, grid=(side, side))
                flops, parameters = forward_flops(decoder), num_parameters(decoder)
                name = f"decoder-{size}"
                if "decode" in stages:
                    found.append(Case("decode", name, image_size, parameters, flops, _decode(decoder)))
                if "train-decoder" in stages:
                    work = _train_decoder(decoder)
                    found.append(Case("train-decoder", name, image_size, parameters, 3 * flops, work))
    return sorted(found, key=lambda case: (STAGES.index(case.stage), case.image_size, case.flops))


def _flat_cases(stages: list[str], size: str) -> list[Case]:
    """Return the rows of compact latents 32×128 of tokens 256×768: DiT on them, and with size s their compressor.

    Encoder of size s and decoder of size b are FlatDINO's `long-32-sb-128`; a step of the compressor is that of both.
    """
    latents, width = FLAT
    config = DiTConfig(
        token_width=width,
        grid=(1, latents),
        num_classes=CLASSES,
        positions="sequence",
        mlp_width=FLAT_MLP_WIDTHS.get(size),
        **DIT_SIZES[size]._asdict(),
    )
    name, parameters, flops = f"dit-flat-{size}", num_parameters(config), forward_flops(config)
    found = []
    if "train-dit" in stages:
        found.append(Case("train-dit", name, 256, parameters, 3 * flops, _train_dit(config, "adamw")))
    if "sample" in stages:
        work = _sample(config, _FLAT_EVALUATIONS)
        found.append(Case("sample", name, 256, parameters, _FLAT_EVALUATIONS * flops, work))
    if size != "s":
        return found
    compressor = FlatConfig(
        num_tokens=256,
        token_width=DECODED_WIDTH,
        num_latents=latents,
        latent_width=width,
        encoder=FlatHalfConfig(**FLAT_SIZES["s"]._asdict()),
        decoder=FlatHalfConfig(**FLAT_SIZES["b"]._asdict()),
    )
    for stage, half in (("encode", compressor.encoder_shape), ("decode", compressor.decoder_shape)):
        if stage in stages:
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in FlatHalf(half).parameters())
            flops = flat_half_flops(half)
            found.append(Case(stage, "flat-32x128", 256, parameters, flops, _flat_half(half)))
    if "train-compressor" in stages:
        flops = 3 * forward_flops(compressor)
        work = _train_compressor(compressor)
        found.append(Case("train-compressor", "flat-32x128", 256, num_parameters(compressor), flops, work))
    return found


def _encode_case(size: str, image_size: int) -> Case:
    name = ENCODERS[size]
    # Patches of 14 pixels on the grid of 16-pixel patches of the stored image.
    input_size = image_size // PATCH * 14

    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        encoder = create_encoder(name, "random:0", input_size=input_size).to(device).eval()
        pixels = torch.rand(batch, 3, input_size, input_size, device=device)
        return _forward(encoder.tokens_of, pixels, precision)

    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, img_size=input_size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.forward_features(torch.empty(1, 3, input_size, input_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Case("encode", f"dinov2-{size}", image_size, parameters, counter.get_total_flops(), work)


def _network(config: ModelConfig, device: torch.device) -> nn.Module:
    with torch.device(device):
        return build_model(config)


def _outputs(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All that a network puts out."""
    return found if isinstance(found, tuple) else (found,)


def _train_dit(config: Any, optimizer_kind: OptimizerName) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        model = _network(config, device)
        optimizer = make_optimizer(model, OptimizerSettings(kind=optimizer_kind, lr=2e-4))
        shape = (batch, config.token_width, *config.grid)
        data, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        t, y = torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)

        def call() -> None:
            with autocast(device, precision):
                predictions = _outputs(model(interpolate(data, noise, t), t, y))
            target = velocity_target(data, noise)
            torch.stack([per_sample_loss(p, target).mean() for p in predictions]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return call, 1

    return work


def _train_decoder(
    config: ViTDecoderConfig,
) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        model = _network(config, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
        tokens = torch.randn(batch, config.num_patches, config.token_width, device=device)
        images = torch.rand(batch, 3, *config.image_size, device=device)

        def call() -> None:
            with autocast(device, precision):
                pixels = model(tokens)
            (pixels.float() - images).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return call, 1

    return work


def _forward(
    network: Callable[[Tensor], Tensor], inputs: Tensor, precision: Precision
) -> tuple[Callable[[], object], float]:
    """Return a stage that is one forward pass without gradient."""

    def call() -> Tensor:
        with torch.inference_mode(), autocast(inputs.device, precision):
            return network(inputs)

    return call, 1


def _flat_half(shape: FlatHalfShape) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        with torch.device(device):
            half = FlatHalf(shape).eval()
        inputs = torch.randn(batch, shape.num_inputs, shape.inputs, device=device)
        return _forward(half, inputs, precision)

    return work


def _train_compressor(config: FlatConfig) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        model = _network(config, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
        tokens = torch.randn(batch, config.num_tokens, config.token_width, device=device)
        noise = torch.randn(batch, config.num_latents, config.latent_width, device=device)

        def call() -> None:
            with autocast(device, precision):
                posterior, made = model(tokens, noise)
            terms = flat_terms(posterior, made, tokens, config=config, weights=FlatLoss())
            terms.loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return call, 1

    return work


def _sample(config: Any, evaluations: int) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        model = _network(config, device).eval()
        noise = torch.randn(batch, config.token_width, *config.grid, device=device)
        y = torch.zeros(batch, dtype=torch.long, device=device)
        grid = time_grid(3, time_shift(noise[0].numel()))

        def called(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with autocast(device, precision):
                velocity, *base = _outputs(model(x, t, labels))
            # Internal guidance moves away from the base output of the same evaluation.
            return torch.lerp(base[0], velocity, 1.78).float() if base else velocity.float()

        def call() -> Tensor:
            with torch.inference_mode():
                return integrate(unguided(called, y), noise, grid)

        return call, evaluations / (len(grid) - 1)

    return work


def _decode(config: ViTDecoderConfig) -> Work:
    def work(device: torch.device, batch: int, precision: Precision) -> tuple[Callable[[], object], float]:
        model = _network(config, device).eval()
        tokens = torch.randn(batch, config.num_patches, config.token_width, device=device)
        return _forward(model, tokens, precision)

    return work


def row(case: Case, cost: Cost | None, calls: float, batch: int) -> dict[str, Any]:
    """Return a row of cost.json; times, memory and energy are None where nothing was measured."""
    values: dict[str, Any] = {name: value for name, value in asdict(case).items() if name != "work"}
    values |= {"batch_size": batch, "images_per_second": None, "tflops_per_second": None}
    values |= {"peak_memory_bytes": None, "joules_per_image": None}
    if cost is not None:
        images = batch / (cost.seconds * calls)
        values["images_per_second"] = images
        values["tflops_per_second"] = images * case.flops * 1e-12
        values["peak_memory_bytes"] = cost.peak_memory
        values["joules_per_image"] = None if cost.joules is None else cost.joules * calls / batch
    return values


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table; a dash where the device does not say."""
    lines = [
        "| stage | network | image | parameters (M) | GFLOPs an image | images/s | TFLOP/s | peak memory (GiB) "
        "| J an image |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for values in rows:
        numbers = [
            _shown(values["parameters"], 1e-6, 1),
            _shown(values["flops"], 1e-9, 1),
            _shown(values["images_per_second"], 1, 3),
            _shown(values["tflops_per_second"], 1, 3),
            _shown(values["peak_memory_bytes"], 2**-30, 2),
            _shown(values["joules_per_image"], 1, 3),
        ]
        head = [values["stage"], values["network"], str(values["image_size"])]
        lines.append(f"| {' | '.join([*head, *numbers])} |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Cost of an image by network: measured seconds where there are any, FLOPs otherwise."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    measured = all(values["images_per_second"] is not None for values in rows)
    names = [f"{values['stage']}  {values['network']}  {values['image_size']}" for values in rows]
    lengths = [1 / values["images_per_second"] if measured else values["flops"] * 1e-9 for values in rows]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    colours = {stage: f"C{number}" for number, stage in enumerate(STAGES)}
    bars = axes.barh(names, lengths, color=[colours[values["stage"]] for values in rows])
    labels = [f"{length:,.0f}" if length >= 100 else f"{length:.3g}" for length in lengths]
    axes.bar_label(bars, labels, padding=3, fontsize="small")
    axes.set_title(title)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.5 / len(rows))
    axes.set_xlabel("seconds an image" if measured else "GFLOPs an image")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Count, measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--sizes", nargs="+", choices=("s", "b", "l", "xl"), default=["s", "b", "l", "xl"])
    parser.add_argument("--image-sizes", nargs="+", type=int, choices=(256, 512), default=[256, 512])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to measure each row for, at least")
    parser.add_argument("--count", action="store_true", help="parameters and FLOPs only")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(options.precision)
    found = cases(options.stages, options.sizes, options.image_sizes)
    if not found:
        raise UsageError("no such networks: encoders are s, b, l and decoders b, l, xl")
    rows = []
    for case in found:
        cost, calls = None, 1.0
        if not options.count:
            call, calls = case.work(device, options.batch_size, options.precision)
            cost = measure(call, device, least_seconds=options.seconds)
        rows.append(row(case, cost, calls, options.batch_size))
        print(table(rows).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": device_name(device), "precision": options.precision, "versions": versions()}
    write_json(options.out / "cost.json", {**settings, "rows": rows})
    (options.out / "cost.md").write_text(table(rows), encoding="utf-8")
    title = "counted" if options.count else f"{settings['device']}, {options.precision}"
    plot(rows, options.out / "cost.png", title)
    print(json.dumps(settings))


if __name__ == "__main__":
    main()
