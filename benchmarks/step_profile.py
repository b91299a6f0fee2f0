"""Where the time of a training step on a GPU goes: kernels by kind, products of matrices by shape.

    python benchmarks/step_profile.py --size xl --batch 64             # on a GPU
    python benchmarks/step_profile.py --generation raev2 --size xl --batch 48
    python benchmarks/step_profile.py --ways plain,autotune,cudnn      # the same step compiled in other ways

One forward and backward pass in bf16, compiled by block as the trainers compile, then the trainers' optimizer. Prints
for each way the median seconds and the FLOP/s; for the first way the kernels as well, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from step import benchmark_config, forward_backward, random_inputs, trained_like
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from train.engine.optimizer import make_optimizer
from train.models.build import build_model
from train.models.cost import forward_flops
from train.settings.config import OptimizerSettings

KINDS = (
    ("fused passes", r"triton_(poi|red|per)_"),
    ("attention", r"flash|fmha|cudnn.*sdpa|attention"),
    ("products of matrices", r"gemm|nvjet|cutlass|cublas|_mm_|splitK"),
    ("optimizer", r"multi_tensor|adam|FusedAdam|foreach"),
    ("copies", r"Memcpy|Memset|copy"),
)
"""Kinds of kernels by their names, the first that fits."""


@contextmanager
def inductor(**options: Any) -> Iterator[None]:
    """Change settings of the compiler."""
    with torch._inductor.config.patch(**options):  # type: ignore[no-untyped-call]
        yield


WAYS: dict[str, Any] = {
    "plain": nullcontext,
    "eager": nullcontext,
    "cudnn": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True),
    "flash": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True),
    "autotune": lambda: inductor(max_autotune=True, max_autotune_gemm_backends="ATEN,TRITON"),
    "pointwise": lambda: inductor(max_autotune_pointwise=True, coordinate_descent_tuning=True),
}
"""The same step otherwise: not compiled, another kernel of attention first, kernels chosen by trial."""


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def tables(profiler: profile, steps: int) -> dict[str, Any]:
    """Print kernels by kind, the longest ones, and products by shape; milliseconds a step."""
    kinds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            milliseconds = event.self_device_time_total / 1e3 / steps
            kinds[kind_of(event.name)] += milliseconds
            counts[kind_of(event.name)] += 1
            kernels[event.name][0] += milliseconds
            kernels[event.name][1] += 1
    print(f"{sum(kinds.values()):.1f} ms of kernels a step")
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {milliseconds:7.2f} ms  {counts[kind] / steps:6.0f} ×  {kind}")
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:36]
    for name, (milliseconds, count) in longest:
        print(f"  {milliseconds:7.2f} ms  {count / steps:6.0f} ×  {name[:110]}")
    products = []
    for row in profiler.key_averages(group_by_input_shape=True):
        if row.key in {"aten::mm", "aten::addmm", "aten::bmm"} and row.device_time_total:
            shapes = row.input_shapes[1:3] if row.key == "aten::addmm" else row.input_shapes[:2]
            flops = 2 * torch.Size(shapes[0]).numel() * shapes[1][-1] * row.count
            milliseconds = row.device_time_total / 1e3
            rate = flops / milliseconds / 1e9
            products.append((milliseconds / steps, row.count / steps, shapes, rate, row.key))
    products.sort(key=lambda product: -product[0])
    print(f"products: {sum(product[0] for product in products):.1f} ms")
    for milliseconds, count, shapes, rate, key in products[:26]:
        print(f"  {milliseconds:7.2f} ms  {count:6.0f} ×  {rate:5.0f} TFLOP/s  {key} {shapes}")
    return {"kinds": kinds, "kernels": dict(longest), "products": products}


def measure(arguments: argparse.Namespace, way: str, *, profiled: bool) -> dict[str, Any]:
    """Time one way."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = benchmark_config(arguments.size, arguments.generation)
    model = trained_like(build_model(config)).to(device)
    if way != "eager":
        model.compile()
    kind = "muon" if arguments.generation == "raev2" else "adamw"
    optimizer = make_optimizer(model, OptimizerSettings(kind=kind, lr=2e-4))
    inputs = random_inputs(config, arguments.batch, device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> None:
        forward_backward(model, inputs, "bf16")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with WAYS[way]():
        begun = wait()
        step()
        first = wait() - begun
        halves: list[list[float]] = [[], []]
        for _ in range(arguments.steps):
            begun = wait()
            forward_backward(model, inputs, "bf16")
            between = wait()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            halves[0].append(between - begun)
            halves[1].append(wait() - between)
        medians = [statistics.median(half) for half in halves]
        flops = 3 * forward_flops(config) * arguments.batch
        found: dict[str, Any] = {"passes": medians[0], "optimizer": medians[1], "first": first}
        print(
            f"{config.kind} {arguments.size}, batch {arguments.batch}, {way}: forward and backward "
            f"{1e3 * medians[0]:.1f} ms, {flops / medians[0] / 1e12:.0f} TFLOP/s, {kind} {1e3 * medians[1]:.1f} ms, "
            f"first step {first:.0f} s",
            flush=True,
        )
        if profiled and device.type == "cuda":
            with profile(
                activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True
            ) as profiler:
                for _ in range(2):
                    step()
                wait()
            found |= tables(profiler, 2)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", default="rae", choices=["rae", "raev2"])
    parser.add_argument("--size", default="narrow", choices=["tiny", "narrow", "s", "b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ways", default="plain", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step_profile.json"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for index, way in enumerate(arguments.ways.split(",")):
        try:
            found[way] = measure(arguments, way, profiled=index == 0)
        except RuntimeError as error:
            print(f"{way}: {str(error).splitlines()[0]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        settings = {**vars(arguments), "out": str(arguments.out), "torch": torch.__version__}
        settings["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        arguments.out.write_text(json.dumps({"settings": settings, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
