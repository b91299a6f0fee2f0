"""The same training step fed from a store, and with the encoder in the loop as the reference trains.

    python benchmarks/step.py --with-encoder                   # CPU: every width divided by 4
    python benchmarks/step.py --with-encoder --batch 64 --precision bf16 --compile       # GPU: the real shapes
    python benchmarks/step.py --with-encoder --latents flat     # 32 × 128 latents; the flat encoder is in the loop too

In the loop means: decode JPEG files in threads, crop, encode with the frozen encoder without gradients, then step.
From the store means: `train.engine.feed.Feed`, then the same step. Both run in turns of several steps in one process;
no image is decoded ahead during the other's turn. What is compared is speed and memory; the tokens in the store are
random.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from measuring import benchmark_plan, benchmark_recipe
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.encoders.encoder import create_encoder
from pipeline.encoders.frozen import Encoder
from shards import EncoderIdentity, Store, StoreWriter, center_crop, decode_image, open_store, usable_cores
from train.distributed import Team
from train.engine.feed import Feed, MicroBatch
from train.engine.optimizer import make_optimizer
from train.engine.resident import ResidentTokens
from train.models.build import build_model
from train.models.compilation import compile_function
from train.models.config import DIT_SIZES, DiTConfig, DiTDHConfig, dit_dh_config
from train.models.cost import forward_flops
from train.models.dequantize import Dequantizer
from train.models.flat import FlatVAE
from train.models.flat_config import FLAT_SIZES, FlatConfig, FlatHalfConfig
from train.models.normalizer import LatentNormalizer
from train.randomness import compile_draws
from train.settings.config import DiTNetwork, DiTSettings
from train.tasks.parts import DiTParts
from train.tasks.velocity import VelocityTask

NUM_IMAGES = 64
JPEG_SIZE = (500, 375)
"""ImageNet's median image."""
CROP = 256


UNTIMED, TIMED = 6, 4
"""Steps of a turn: those in which what the other way left behind is used up, and those whose time is taken."""

FLAT = (32, 128)
"""Number and width of flat latents."""


def flat_shapes(size: str, *, scaled: bool) -> DiTConfig:
    """Plain DiT on flat latents, of a published size or of a quarter of every width."""
    length, width = FLAT
    config = DiTConfig(
        token_width=width,
        grid=(1, length),
        num_classes=1000,
        positions="sequence",
        **DIT_SIZES[size]._asdict(),
    )
    if not scaled:
        return config
    return replace(config, token_width=width // 4, width=config.width // 4, num_heads=config.num_heads // 2)


def flat_compressor(encoder: Encoder, *, scaled: bool) -> FlatVAE:
    """Return a compressor of the encoder's tokens, encoder of size s as published, or of a quarter of every width."""
    width, depth, heads, mlp = FLAT_SIZES["s"]
    half = FlatHalfConfig(
        width=width // (4 if scaled else 1),
        depth=depth,
        num_heads=heads // (2 if scaled else 1),
        mlp_width=mlp // (4 if scaled else 1),
    )
    config = FlatConfig(
        num_tokens=encoder.identity.num_tokens,
        token_width=encoder.identity.width,
        num_latents=FLAT[0],
        latent_width=FLAT[1] // (4 if scaled else 1),
        encoder=half,
        decoder=half,
    )
    return build_model(config).eval()


def shapes(size: str, *, scaled: bool) -> DiTDHConfig:
    """DiT-DH of a published size, or of a quarter of every width."""
    config = dit_dh_config(size, token_width=768, grid=(16, 16), num_classes=1000)
    if not scaled:
        return config
    return replace(
        config, token_width=192, width=config.width // 4, num_heads=config.num_heads // 2, head_width=512
    )


def make_photographs() -> list[bytes]:
    """JPEG files of smooth noise, which decode about as slowly as photographs."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def make_token_store(path: Path, identity: EncoderIdentity) -> Store:
    """Return a store of random tokens of an identity's shape."""
    plan = benchmark_plan(NUM_IMAGES, 2)
    recipe = replace(benchmark_recipe(plan), encoder=identity)
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    generator = np.random.default_rng(0)
    shape = (identity.num_tokens, identity.width)
    for view, shard in writer.pending():
        rows = plan.rows_of(shard)
        with writer.shard(view, shard) as output:
            tokens = generator.standard_normal((len(rows), *shape), np.float32).astype(np.float16)
            output.write_block(0, {"tokens": tokens})
            output.publish()
    writer.finalize()
    return open_store(path)


class EncodedInTheLoop:
    """Micro-batches made as the reference makes them: decoded, cropped and encoded at every step."""

    def __init__(
        self, files: list[bytes], encode: Callable[[Tensor], Tensor], batch: int, device: torch.device
    ) -> None:
        self._files, self._encode, self._batch, self._device = files, encode, batch, device
        self._pool = ThreadPoolExecutor(usable_cores())
        self._step = 0
        self._ahead = [self._pool.submit(self._pixels, index) for index in range(2 * batch)]

    def __iter__(self) -> Iterator[MicroBatch]:
        batch = self._batch
        while True:
            images = np.stack([future.result() for future in self._ahead[:batch]])
            begin = (self._step + 2) * batch
            self._ahead = self._ahead[batch:]
            self._ahead += [self._pool.submit(self._pixels, begin + index) for index in range(batch)]
            crops = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            positions = torch.arange(self._step * batch, (self._step + 1) * batch, device=self._device)
            yield MicroBatch(
                step=self._step,
                rows=positions.cpu().numpy(),
                positions=positions,
                labels=positions % 1000,
                fields={"tokens": self._encode(crops)},
                last_of_step=True,
            )
            self._step += 1

    def rest(self) -> None:
        """Wait until nothing is decoded any more."""
        wait(self._ahead)

    def _pixels(self, index: int) -> np.ndarray:
        return center_crop(decode_image(self._files[index % len(self._files)]), CROP)


def no_snapshot(step: int, ema_rate: float) -> NoReturn:
    """Save nothing: this is a benchmark."""
    raise AssertionError(f"a snapshot was asked for at step {step}, rate {ema_rate}")


def finished(device: torch.device) -> float:
    """Wait for the device and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_of(
    config: DiTDHConfig | DiTConfig, precision: str, device: torch.device, *, compiled: bool
) -> Callable[[MicroBatch], None]:
    """One optimizer step of a fresh network."""
    model = build_model(config).to(device)
    if compiled:
        model.compile()
    compile_draws(compile_function if compiled else None)
    normalizer = LatentNormalizer(None, torch.ones(config.token_width, *config.grid)).to(device)
    settings = DiTSettings(model=DiTNetwork(width=8, depth=1, num_heads=1))
    task = VelocityTask(
        DiTParts(
            model=model,
            normalizer=normalizer,
            settings=settings,
            snapshot_meta=no_snapshot,
            dequantizer=Dequantizer(None),
        )
    )
    optimizer = make_optimizer(model, settings.optimizer)

    def step(batch: MicroBatch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = task.losses(model, batch)
        losses.per_sample.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    arguments: argparse.Namespace,
    size: str,
    files: list[bytes],
    encode: Callable[[Tensor], Tensor],
    encode_flops: float,
    store: Store,
) -> dict[str, float]:
    """Images a second and peak memory of both ways, for one size."""
    team = Team()
    device = team.device
    flat = arguments.latents == "flat"
    config = (flat_shapes if flat else shapes)(size, scaled=device.type == "cpu")
    # As the trainer does by itself on CUDA with latents that fit.
    resident = ResidentTokens(store, ("center",), store.valid_rows, device) if flat else None
    step = trainer_of(config, arguments.precision, device, compiled=arguments.compile)
    feed = Feed(
        store,
        team,
        fields=("tokens",),
        views=("center",),
        seed=0,
        global_batch_size=arguments.batch,
        micro_batch_size=None,
        start_sample=0,
        threads=2,
        resident=resident,
    )
    loop = EncodedInTheLoop(files, encode, arguments.batch, device)
    ways: dict[str, Iterator[MicroBatch]] = {"store": iter(feed), "encoder in the loop": iter(loop)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    began = time.perf_counter()
    for turn in range(arguments.steps):
        if turn >= 2 and time.perf_counter() - began > arguments.seconds:
            break
        for name, batches in ways.items():
            loop.rest()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(UNTIMED):
                step(next(batches))
            begun = finished(device)
            for _ in range(TIMED):
                step(next(batches))
            seconds[name].append((finished(device) - begun) / TIMED)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
    feed.close()
    rates = {name: arguments.batch / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(
        b / a for a, b in zip(seconds["store"], seconds["encoder in the loop"], strict=True)
    )
    return {
        "store": rates["store"],
        "encoder": rates["encoder in the loop"],
        "ratio": ratio,
        "gflop": 3 * forward_flops(config) / 1e9,
        "ratio by arithmetic": 1 + encode_flops / (3 * forward_flops(config)),
        **{f"GB {name}": peak for name, peak in peaks.items()},
    }


def main(arguments: argparse.Namespace) -> None:
    """Measure S, B, L and XL, print and write."""
    device = Team().device
    name = "vit_tiny_patch16_224" if device.type == "cpu" else "vit_base_patch14_reg4_dinov2"
    encoder = (
        create_encoder(name, "random:0", input_size=256 if device.type == "cpu" else None).to(device).eval()
    )
    print(
        f"{name} on {device}, batch {arguments.batch}, {arguments.precision}, {torch.get_num_threads()} threads"
    )
    encode, identity = encoder.encode, encoder.identity
    if arguments.latents == "flat":
        compressor = flat_compressor(encoder, scaled=device.type == "cpu").to(device)
        identity = replace(identity, grid=compressor.config.latent_grid, width=compressor.config.latent_width)

        @torch.inference_mode()
        def encode(pixels: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                return compressor.encode(encoder.encode(pixels)).float()

    with FlopCounterMode(display=False) as counter:
        encode(torch.zeros((1, 3, CROP, CROP), dtype=torch.uint8, device=device))
    columns = (
        "GFLOP an image | from the store | encoder in the loop | ratio | by arithmetic | GB store / loop"
    )
    print(f"| {'DiT on flat latents' if arguments.latents == 'flat' else 'DiT-DH'} | {columns} |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = make_photographs()
        store = make_token_store(Path(folder) / "store", identity)
        for size in arguments.sizes.split(","):
            row = found[size] = measure(arguments, size, files, encode, counter.get_total_flops(), store)
            memory = (
                f"{row['GB store']:.1f} / {row['GB encoder in the loop']:.1f}" if "GB store" in row else ""
            )
            print(
                f"| {size.upper()} | {row['gflop']:.1f} | {row['store']:.2f} images/s | "
                f"{row['encoder']:.2f} images/s | {row['ratio']:.2f} | {row['ratio by arithmetic']:.2f} | "
                f"{memory} |",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps(
            {"device": str(device), "batch": arguments.batch, "latents": arguments.latents, "sizes": found},
            indent=1,
        )
        + "\n"
    )
