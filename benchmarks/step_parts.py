"""Parts of a training step one by one, each against the way it is compared with, in turns in one process.

    python benchmarks/step_parts.py                                  # on a CPU: XL's blocks, narrow
    python benchmarks/step_parts.py --size xl --batch 64             # on a GPU
    python benchmarks/step_parts.py --parts update,draws

update: clip, AdamW and one average, in separate passes and in one (`--one-pass`). draws: a micro-batch's noise, step by
step and compiled. head: the wide head's blocks forward and backward in bfloat16 autocast, with a float32 and a bfloat16
residual stream (`--head-residual`). attention: forward and backward in bfloat16 for head widths of 64 to 128 by every
kernel that PyTorch has here. Prints seconds, bytes by arithmetic and ratios, and writes JSON. On a CPU one thread
computes and seconds are its processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.engine.ema import WeightAverages
from train.engine.optimizer import make_optimizer
from train.engine.update import OnePass, SeparatePasses
from train.models.build import build_model
from train.models.compilation import compile_function
from train.models.config import DiTDHConfig, dit_dh_config
from train.models.layers import run_blocks
from train.randomness import compile_draws, normal
from train.settings.config import OptimizerSettings

RATE = 0.9995
SEPARATE_BYTES, ONE_PASS_BYTES = 52, 40
"""Memory traffic a parameter with one average: 13 and 10 float32 numbers read or written (train/engine/update.py)."""


def network_config(size: str) -> DiTDHConfig:
    """Return DiT-DH of a size, or "narrow": XL's depth at a width a CPU runs."""
    if size == "narrow":
        config = dit_dh_config("xl", token_width=192, grid=(16, 16), num_classes=10)
        return replace(config, width=288, num_heads=4, head_width=512, head_num_heads=4)
    return dit_dh_config(size, token_width=768, grid=(16, 16), num_classes=1000)


def in_turns(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Return median seconds of each way, called in turns after two calls of each that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for index in range(rounds + 2):
        for name, way in ways.items():
            _wait(device)
            begun = clock()
            way()
            _wait(device)
            if index >= 2:
                seconds[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def update(config: DiTDHConfig, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure clip, AdamW and one average: separate passes against one, from the same weights and gradients."""
    models, updates, optimizers, averages = {}, {}, {}, {}
    for name, way in (("separate passes", SeparatePasses), ("one pass", OnePass)):
        torch.manual_seed(0)
        with device:
            model = models[name] = build_model(config)
        optimizers[name] = make_optimizer(model, OptimizerSettings())
        averages[name] = WeightAverages(model, (RATE,))
        updates[name] = way(model, optimizers[name], averages[name], 1.0)
    trained = {n: p for n, p in models["one pass"].named_parameters() if p.requires_grad}
    gradients = {name: 1e-3 * torch.randn_like(parameter) for name, parameter in trained.items()}
    loss = torch.zeros((), device=device)

    def step(name: str) -> None:
        for parameter, gradient in gradients.items():
            models[name].get_parameter(parameter).grad = gradient
        updates[name](loss)

    # The separate way clips the gradients in place, so they are shorter than the largest norm after its first step.
    total = torch.nn.utils.get_total_norm(list(gradients.values()))
    torch._foreach_div_(list(gradients.values()), float(total))
    begun = time.perf_counter()
    step("one pass")
    _wait(device)
    first = time.perf_counter() - begun
    step("separate passes")
    seconds = in_turns({name: lambda name=name: step(name) for name in updates}, device, arguments.rounds)
    count = sum(parameter.numel() for parameter in trained.values())
    peer = dict(models["separate passes"].named_parameters())
    ulp = max(_ulps(parameter.detach(), peer[name].detach()) for name, parameter in trained.items())
    rates = {
        name: size * count / seconds[name] / 1e9
        for name, size in (("separate passes", SEPARATE_BYTES), ("one pass", ONE_PASS_BYTES))
    }
    print(f"update of {count / 1e6:.0f} M parameters; the one pass is compiled in {first:.1f} s")
    for name, value in seconds.items():
        print(f"  {name:16} {1e3 * value:9.2f} ms   {rates[name]:8.1f} GB/s")
    print(
        f"  one pass takes {seconds['one pass'] / seconds['separate passes']:.2f} of the time; after "
        f"{arguments.rounds + 3} steps weights differ by at most {ulp:.0f} ulp of the largest weight of their tensor"
    )
    return {
        "seconds": seconds,
        "parameters": count,
        "first_seconds": first,
        "gb_per_second": rates,
        "ulp": ulp,
    }


def _ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    largest = float(a.abs().max())
    return float((a - b).abs().max()) / (torch.finfo(a.dtype).eps * largest / 2) if largest else 0.0


def draws(config: DiTDHConfig, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a micro-batch's noise: step by step against compiled."""
    positions = torch.arange(arguments.batch, device=device)
    shape = (config.token_width, *config.grid)

    def drawn(*, compiled: bool) -> torch.Tensor:
        compile_draws(programs if compiled else None)
        return normal(0, "noise", positions, shape)

    cache: dict[str, Callable[..., Any]] = {}

    def programs(function: Callable[..., Any]) -> Callable[..., Any]:
        return cache.setdefault(function.__name__, compile_function(function))

    begun = time.perf_counter()
    same = torch.equal(drawn(compiled=True), drawn(compiled=False))
    first = time.perf_counter() - begun
    ways: dict[str, Callable[[], object]] = {
        "step by step": lambda: drawn(compiled=False),
        "compiled": lambda: drawn(compiled=True),
    }
    seconds = in_turns(ways, device, arguments.rounds)
    compile_draws(None)
    count = positions.numel() * config.token_width * config.grid[0] * config.grid[1]
    print(f"draws: {count / 1e6:.1f} M normal numbers, equal bits: {same}; first call {first:.1f} s")
    for name, value in seconds.items():
        print(f"  {name:16} {1e3 * value:9.2f} ms")
    print(f"  compiled takes {seconds['compiled'] / seconds['step by step']:.3f} of the time")
    return {"seconds": seconds, "numbers": count, "same_bits": same, "first_seconds": first}


def head(config: DiTDHConfig, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the head's blocks, compiled, with a float32 and a bfloat16 residual stream."""
    torch.manual_seed(0)
    with device:
        model = build_model(replace(config, depth=0))
    model.compile()
    tokens = config.token_grid[0] * config.token_grid[1]
    x = torch.randn(arguments.batch, tokens, config.head_width, device=device)
    condition = torch.randn_like(x).bfloat16().requires_grad_()

    def step(dtype: torch.dtype) -> None:
        stream = x.to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            out = run_blocks(model.blocks, stream, condition, model.dec_feat_rope, recompute=False)
        out.sum(dtype=torch.float32).backward()
        model.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[], object]] = {
        str(dtype).removeprefix("torch."): lambda dtype=dtype: step(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds = in_turns(ways, device, arguments.rounds)
    print(f"head: {len(model.blocks)} blocks of width {config.head_width}, batch {arguments.batch}")
    for name, value in seconds.items():
        print(f"  residual stream {name:10} {1e3 * value:9.2f} ms")
    return {"seconds": seconds}


def attention(config: DiTDHConfig, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure attention by width and kernel; `default` is what PyTorch chooses by itself."""
    del config
    found: dict[str, Any] = {}
    heads, tokens = (16, 256) if device.type == "cuda" else (4, 256)
    kernels = {
        kernel.lower(): getattr(SDPBackend, kernel) for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION")
    }
    kernels |= {"efficient_attention": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    print(
        f"attention: batch {arguments.batch}, {heads} heads, {tokens} tokens, bfloat16, forward and backward"
    )
    for width in (64, 72, 80, 96, 128):
        qkv = [
            torch.randn(arguments.batch, tokens, heads, width, device=device, dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for _ in range(3)
        ]

        def step(backend: SDPBackend | None, qkv: list[torch.Tensor] = qkv) -> None:
            if backend is None:
                out = F.scaled_dot_product_attention(*qkv)
            else:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(*qkv)
            torch.autograd.grad(out.sum(), qkv)

        ways: dict[str, Callable[[], object]] = {"default": lambda step=step: step(None)}
        for name, backend in kernels.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    step(backend)
                except RuntimeError:
                    continue
            ways[name] = lambda step=step, backend=backend: step(backend)
        seconds = in_turns(ways, device, arguments.rounds)
        operations = 3.5 * 4 * arguments.batch * heads * tokens**2 * width
        line = "   ".join(
            f"{n} {1e3 * s:.2f} ms, {operations / s / 1e12:.2f} TFLOP/s" for n, s in seconds.items()
        )
        print(f"  width {width:3}: {line}", flush=True)
        found[str(width)] = {"seconds": seconds, "operations": operations}
        if device.type == "cuda":
            found[str(width)]["kernels"] = _kernel_names(lambda step=step: step(None))
            print(f"    default runs {', '.join(found[str(width)]['kernels'])}")
    return found


def _kernel_names(work: Callable[[], object]) -> list[str]:
    """Return names of the attention kernels that a GPU runs."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    words = ("flash", "fmha", "cudnn", "sdpa")
    return sorted({e.key[:90] for e in profile.key_averages() if any(w in e.key.lower() for w in words)})


PARTS = {"update": update, "draws": draws, "head": head, "attention": attention}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--size", default="narrow", choices=["narrow", "s", "b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step_parts.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    config, found = network_config(arguments.size), {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        **vars(arguments),
        "out": str(arguments.out),
        "device": str(device),
        "torch": torch.__version__,
    }
    for name in arguments.parts.split(","):
        found[name] = PARTS[name](config, device, arguments)
        arguments.out.write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
