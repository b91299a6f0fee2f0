"""What a step of Muon costs against one of fused AdamW, and against the forward and backward pass that it follows.

    python benchmarks/optimizer_step.py --threads 1                         # on a CPU: a narrow RAEv2
    python benchmarks/optimizer_step.py --size xl --batch 64 --precision bf16 --compile     # on a GPU
    python benchmarks/optimizer_step.py --count                             # multiplications of S to XL, at once

Both optimizers are the trainers', over copies of one network with the same gradients; they and the network take turns.
A process of a team orthogonalizes its share of the matrices, so with N processes Muon's part is an Nth of what is
measured here. Writes JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from step import benchmark_config, forward_backward, random_inputs, trained_like
from torch import nn

from train.engine.muon import BEFORE_RESTART, POLAR_EXPRESS
from train.engine.optimizer import make_optimizer
from train.models.build import build_model
from train.models.cost import forward_flops
from train.settings.config import OptimizerSettings

GLOBAL_BATCH = 1024
"""Samples of a published step. Source: github:nanovisionx/RAEv2 at 8a0d238."""


def muon_flops(shapes: Iterable[tuple[int, int]], *, by_gram: bool) -> int:
    """FLOPs of orthogonalizing matrices of these shapes; a multiplication with its addition counts as two."""
    total = 0
    for shape in shapes:
        n, m = sorted(shape)
        if by_gram and n != m:
            parts = (BEFORE_RESTART, len(POLAR_EXPRESS) - BEFORE_RESTART)
            # Each part: the Gram matrix and Q X; of its iterations one square product each, for all but the first one
            # that multiplies Q, for all but the last two that make the next Gram matrix.
            total += sum(4 * n * n * m + 2 * n**3 * (part + (part - 1) + 2 * (part - 1)) for part in parts)
        else:
            total += len(POLAR_EXPRESS) * (4 * n * n * m + 2 * n**3)
    return total


def matrices(model: nn.Module) -> list[tuple[int, int]]:
    """Shapes of the parameters that Muon takes."""
    return [(p.shape[0], p.shape[1]) for p in model.parameters() if p.requires_grad and p.ndim == 2]


def count(generation: str) -> dict[str, dict[str, float]]:
    """By size: FLOPs of a step of Muon on a GPU, and their share of a step of the published batch."""
    found = {}
    for size in ("s", "b", "l", "xl"):
        config = benchmark_config(size, generation)
        with torch.device("meta"):
            flops = muon_flops(matrices(build_model(config)), by_gram=True)
        found[size] = {
            "muon_flops": flops,
            "share_of_step": flops / (3 * forward_flops(config) * GLOBAL_BATCH),
        }
        print(
            f"{config.kind}-{size}: {flops / 1e12:5.1f} TFLOP a step of Muon, "
            f"{found[size]['share_of_step']:.2%} of a step of {GLOBAL_BATCH} samples"
        )
    return found


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the network's pass and of each optimizer's step."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    config = benchmark_config(arguments.size, arguments.generation)
    model = trained_like(build_model(config)).to(device)
    models = {"adamw": copy.deepcopy(model), "muon": copy.deepcopy(model)}
    if arguments.compile:
        model.compile()
    inputs = random_inputs(config, arguments.batch, device)

    def network() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, inputs, arguments.precision)

    work: dict[str, Callable[[], object]] = {"forward and backward": network}
    for name, copied in models.items():
        for parameter in copied.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        kind = "muon" if name == "muon" else "adamw"
        work[name] = make_optimizer(copied, OptimizerSettings(kind=kind, lr=2e-4)).step
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for index in range(arguments.steps + 2):
        for name, call in work.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 2:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = medians["forward and backward"] + medians["adamw"]
    extra = (medians["muon"] - medians["adamw"]) / whole
    print(f"{config.kind} {arguments.size}, batch {arguments.batch}, {arguments.precision}, {device}")
    for name, median in medians.items():
        print(f"{name:24} {1e3 * median:9.1f} ms")
    print(f"a step of {arguments.batch} samples with Muon takes {1 + extra:.3f} of one with fused AdamW")
    return medians


def main() -> None:
    """Measure or count, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", default="raev2", choices=["rae", "raev2"])
    parser.add_argument("--size", default="narrow", choices=["tiny", "narrow", "s", "b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--count", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/optimizer_step.json"))
    arguments = parser.parse_args()
    counted = count(arguments.generation)
    medians = {} if arguments.count else measure(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {**vars(arguments), "out": str(arguments.out), "torch": torch.__version__}
    settings["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"settings": settings, "counted": counted, "median_seconds": medians}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
