"""What a decoder's step takes when the discriminator begins to learn, and when the decoder begins to play against it.

    python benchmarks/adversarial_memory.py                       # CPU: ViT-B
    python benchmarks/adversarial_memory.py --size xl --batch 16 --precision bf16        # a GPU

One step each of three times: the reconstruction alone, the discriminator learning beside it, the decoder playing
against it. Memory is what a step allocates at its peak on top of weights and gradients. The frozen networks have their
published shapes and random weights. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from train.distributed import Team
from train.engine.feed import MicroBatch
from train.models.build import build_model
from train.models.config import decoder_config
from train.models.dequantize import Dequantizer
from train.models.discriminator import DINO_SIZES, DinoFeatures, Discriminator
from train.models.perceptual import Perceptual
from train.settings.config import AdversarySettings, DecoderNetwork, DecoderSettings
from train.tasks.adversarial import AdversarialTask

PHASES = ("reconstruction alone", "discriminator learns", "decoder plays")
"""The phase of step 0, 1 and 2: schedules have one step an epoch."""
GRID, WIDTH, IMAGE_SIZE = (16, 16), 768, 256


def make_task(size: str, device: torch.device) -> AdversarialTask:
    """Return a decoder of a published size with all that judges it."""

    def no_snapshot(step: int, ema_rate: float) -> NoReturn:
        raise AssertionError(f"a snapshot was asked for at step {step}, rate {ema_rate}")

    torch.manual_seed(0)
    return AdversarialTask(
        build_model(decoder_config(size, token_width=WIDTH, grid=GRID)).to(device),
        DecoderSettings(
            model=DecoderNetwork(width=8, depth=1, num_heads=1, mlp_width=8),
            perceptual="lpips",
            adversarial=True,
            adversary=AdversarySettings(discriminator_start_epoch=1, adversarial_start_epoch=2),
        ),
        no_snapshot,
        None,
        dequantizer=Dequantizer(None),
        perceptual=Perceptual().to(device),
        features=DinoFeatures(DINO_SIZES["S_8"]).to(device),
        discriminator=Discriminator().to(device),
        team=Team(),
        steps_per_epoch=1,
    )


def make_batches(step: int, count: int, micro_batches: int, device: torch.device) -> list[MicroBatch]:
    """Return a step's micro-batches of random tokens and images."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randn(count, GRID[0] * GRID[1], WIDTH, generator=generator).half()
    images = torch.randint(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    positions = torch.arange(count)
    return [
        MicroBatch(
            step=step,
            rows=part.numpy(),
            positions=part.to(device),
            labels=torch.zeros_like(part, device=device),
            fields={"tokens": tokens[part].to(device), "image": images[part].to(device)},
            last_of_step=index == micro_batches - 1,
        )
        for index, part in enumerate(positions.chunk(micro_batches))
    ]


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors alive at once during the work, over those alive before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    result = recorded.profiler.kineto_results  # the only place where allocations are listed one by one
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    return int(np.cumsum([nbytes for _, nbytes in sorted(changes)]).max())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="b", choices=["b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/adversarial_memory.json"))
    arguments = parser.parse_args()
    device = Team().device
    task = make_task(arguments.size, device)
    for parameter in task.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    found = {}
    print("| step | peak memory | an image | seconds |\n|---|---|---|---|")
    for step, phase in enumerate(PHASES):
        batches = make_batches(step, arguments.batch, arguments.micro_batches, device)

        def work(batches: list[MicroBatch] = batches) -> None:
            scale = 1 / arguments.batch
            task.before_step(batches, scale, autocast)
            for batch in batches:
                task.backward(task.model, batch, scale, autocast)
            task.after_update(batches, scale, autocast)
            if device.type == "cuda":
                torch.cuda.synchronize()

        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun
        peak = peak_bytes(work, device)
        found[phase] = {"peak_bytes": peak, "seconds": seconds}
        print(f"| {phase} | {peak / 1e9:.2f} GB | {peak / arguments.batch / 1e6:.0f} MB | {seconds:.2f} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {name: str(value) for name, value in vars(arguments).items()} | {"device": str(device)}
    arguments.out.write_text(json.dumps({"settings": facts, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
