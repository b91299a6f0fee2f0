"""What a mean-flow step costs against a flow-matching step: `python benchmarks/step.py --mean-flow`.

Distillation as train/dit.py does it: the teacher's velocity, two calls of the network without gradient for the quarter
of the samples that learn a jump, one call with gradient; by multiplications 4.5 forward passes instead of 3. Beside it
fine-tuning, which has no teacher (3.5), and distillation as published, whose three calls of the network are one batch
with gradient (10; github:sony/mf-rae src/stage2/transport/transport.py at fffc544). Steps are forward and backward of
one micro-batch and take turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from train.engine.arithmetic import allow_tf32
from train.engine.feed import MicroBatch
from train.engine.task import Losses, Task
from train.flow.mean_flow import adaptive_loss, average_velocity_target
from train.flow.path import interpolate
from train.models.build import build_model
from train.models.config import DiTDHConfig
from train.models.dequantize import Dequantizer
from train.models.normalizer import LatentNormalizer
from train.randomness import normal
from train.settings.config import DiTSettings
from train.settings.few_step import MeanFlowSettings
from train.settings.presets import dit_settings
from train.tasks.mean_flow import MeanFlowTask
from train.tasks.parts import DiTParts
from train.tasks.velocity import VelocityTask
from train.weights.snapshot import SnapshotMeta, save_snapshot

MOST = 1.6
"""Flow-matching steps that a distillation step may cost, with all calls in one precision."""


class PublishedTask(MeanFlowTask):
    """Distillation with the difference quotient inside the batch that has a gradient."""

    def losses(self, model: nn.Module, batch: MicroBatch) -> Losses:
        """Return the same losses at the published price."""
        data = self._latents(batch.fields["tokens"])
        noise = normal(self._settings.seed, "noise", batch.positions, tuple(data.shape[1:]))
        t, r = self.spans(batch.positions)
        y, delta = self.labels(batch), self._mean_flow.delta
        x_t = interpolate(data, noise, t)
        assert self._teacher is not None
        velocity = self._teacher.field(y)(x_t, t)
        at, ahead, behind = model(
            torch.cat([x_t, x_t + delta * velocity, x_t - delta * velocity]),
            torch.cat([t, t + delta, t - delta]),
            y.repeat(3),
            r=r.repeat(3),
        ).chunk(3)
        derivative = (ahead.float() - behind.float()) / (2 * delta)
        loss, _ = adaptive_loss(at, average_velocity_target(velocity, t, r, derivative))
        return Losses(loss, {})


def main(
    arguments: argparse.Namespace, config: DiTDHConfig, trained_like: Callable[[nn.Module], nn.Module]
) -> None:
    """Measure, print and write.

    Args:
        arguments: those of step.py.
        config: the network.
        trained_like: gives the layers that start as zero other values.
    """
    torch.set_num_threads(arguments.threads)
    allow_tf32(allowed=arguments.precision != "fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        student = build_model(replace(config, end_time=True))
    student = trained_like(student)
    taught = copy.deepcopy(student.state_dict())
    taught = {name: value for name, value in taught.items() if not name.startswith("r_embedder")}
    shape = (config.token_width, *config.grid)
    normalizer = LatentNormalizer(torch.zeros(shape), torch.ones(shape))
    file = arguments.out.parent / "mean_flow_teacher.safetensors"
    save_snapshot(file, taught, config=config, normalizer=normalizer, meta=meta_of(config))
    base = replace(
        dit_settings("dit-dh-xl-256-mfd"),
        precision=arguments.precision,
        compile=arguments.compile,
        teacher=file,
    )

    def parts(settings: DiTSettings, *, end_time: bool) -> DiTParts:
        with device:
            model = build_model(replace(config, end_time=end_time))
        model.load_state_dict(student.state_dict() if end_time else taught)
        if settings.compile:
            model.compile()
        return DiTParts(
            settings=settings,
            model=model.to(device),
            normalizer=normalizer.to(device),
            dequantizer=Dequantizer(None),
            snapshot_meta=lambda _step, _rate: meta_of(config),
        )

    tf32 = replace(base, mean_flow=MeanFlowSettings(derivative="tf32"))
    makers: dict[str, Callable[[], Task]] = {
        "flow matching": lambda: VelocityTask(parts(replace(base, teacher=None), end_time=False)),
        "distillation": lambda: MeanFlowTask(
            parts(base if arguments.precision != "tf32" else tf32, end_time=True)
        ),
        "fine-tuning": lambda: MeanFlowTask(parts(replace(base, teacher=None), end_time=True)),
        "distillation as published": lambda: PublishedTask(parts(base, end_time=True)),
    }
    if arguments.precision == "bf16":
        makers["distillation, quotient in tf32"] = lambda: MeanFlowTask(parts(tf32, end_time=True))
        # More networks of size XL do not fit a GPU of 80 GB beside these.
        del makers["distillation as published"], makers["fine-tuning"]
    tasks = {name: make() for name, make in makers.items()}

    batch = micro_batch(config, arguments.batch, device)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(arguments.steps + 3):
        for name, task in tasks.items():
            elapsed = step(task, batch, arguments.precision, device)
            if index >= 3:
                seconds[name].append(elapsed)
    ratios = {
        name: statistics.median(b / a for a, b in zip(seconds["flow matching"], values, strict=True))
        for name, values in seconds.items()
    }
    print(
        f"mean-flow steps, DiT-DH {arguments.size}, batch {arguments.batch}, {arguments.precision}"
        f"{', compiled' if arguments.compile else ''}, {device}, {arguments.threads} threads"
    )
    for name, values in seconds.items():
        print(
            f"{name:32} {1e3 * statistics.median(values):9.1f} ms   {ratios[name]:5.2f} flow-matching steps"
        )
    if arguments.precision != "bf16":
        verdict = "within" if ratios["distillation"] <= MOST else "OVER"
        print(f"goal: a distillation step costs at most {MOST} flow-matching steps: {verdict}")
    path = arguments.out.with_name("mean_flow_step.json")
    settings = {**vars(arguments), "out": str(path), "device": str(device), "torch": torch.__version__}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    path.write_text(
        json.dumps({"settings": settings, "median_seconds": medians, "ratio": ratios, "goal": MOST}, indent=2)
    )
    file.unlink()


def step(task: Task, batch: MicroBatch, precision: str, device: torch.device) -> float:
    """Seconds of a forward and backward pass; on a CPU of its threads alone, so that other programs do not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    task.model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    arithmetic = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    task.backward(task.model, batch, 1 / len(batch), arithmetic)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def micro_batch(config: DiTDHConfig, size: int, device: torch.device) -> MicroBatch:
    """Random tokens with labels."""
    tokens: Tensor = torch.randn(size, config.grid[0] * config.grid[1], config.token_width).half()
    return MicroBatch(
        step=0,
        rows=np.arange(size),
        positions=torch.arange(size, device=device),
        labels=torch.randint(config.num_classes, (size,)).to(device),
        fields={"tokens": tokens.to(device)},
        last_of_step=True,
    )


def meta_of(config: DiTDHConfig) -> SnapshotMeta:
    """Return the origin of weights that come from nowhere."""
    return SnapshotMeta(
        encoder={},
        class_names=(),
        num_classes=config.num_classes,
        grid=config.grid,
        width=config.token_width,
        step=None,
        samples_seen=None,
        ema_rate=None,
    )


if __name__ == "__main__":
    raise SystemExit(f"run {Path(__file__).with_name('step.py').name} --mean-flow")
