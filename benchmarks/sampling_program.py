"""Networks as `eval/generation.py` runs them, for benchmarks/sampling.py: its loop, and the rates of its parts."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.generate.producer import Producer
from eval.generate.sampler import LatentSampler
from eval.images.samples import SamplesFile
from eval.images.sheets import to_uint8
from eval.networks.load import Decoder, autocast, load_decoder, load_dit, make_ready, set_precision
from eval.settings import Precision
from train.flow.integrators import integrate
from train.models.build import build_model
from train.models.config import (
    DiTDHConfig,
    LatentTransformerConfig,
    ViTDecoderConfig,
    decoder_config,
    dit_dh_config,
)
from train.models.normalizer import LatentNormalizer

POINTS = 50
"""Of the published grid: 49 evaluations."""
CONTRAST = 0.225
"""Standard deviation of the pixels of a photograph. Source: the usual ImageNet statistics."""
SCALE = 1.42
"""Of the published AutoGuidance. Source: github:bytetriper/RAE configs/stage2/sampling at a4d18c4."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What is measured."""

    dit: nn.Module
    guide: nn.Module
    decoder: nn.Module
    normalizer: LatentNormalizer
    shift_base: int = 4096


@dataclass(frozen=True)
class Way:
    """An arithmetic, compiled or not."""

    precision: Precision
    compiled: bool

    def __str__(self) -> str:
        """Name the way as the tables do."""
        return f"{self.precision}, {'compiled' if self.compiled else 'eager'}"


def configs(size: str) -> tuple[DiTDHConfig, DiTDHConfig, ViTDecoderConfig]:
    """Give model, guide and decoder of a published size, or of XL's proportions at a size a CPU runs."""
    if size == "narrow":
        base = dit_dh_config("s", token_width=96, grid=(8, 8), num_classes=10)
        narrow = replace(
            base, width=144, depth=7, num_heads=4, head_width=256, head_depth=2, head_num_heads=4
        )
        decoder = ViTDecoderConfig(
            token_width=96, grid=(8, 8), width=192, depth=6, num_heads=4, mlp_width=768
        )
        return narrow, replace(narrow, width=48, depth=3, num_heads=2, head_depth=1), decoder
    shape: dict[str, Any] = {"token_width": 768, "grid": (16, 16), "num_classes": 1000}
    return (
        dit_dh_config(size, **shape),
        dit_dh_config("s", **shape),
        decoder_config("xl", token_width=768, grid=(16, 16)),
    )


def random_networks(size: str, device: torch.device) -> Networks:
    """Build networks with random weights: no product is one with zeros, and images have a photograph's contrast."""
    torch.manual_seed(0)
    dit, guide, decoder = configs(size)
    with torch.device(device):
        built = [build_model(config) for config in (replace(dit, end_time=True), guide, decoder)]
    for network in built:
        network.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.02)
    with torch.inference_mode():
        pixels = built[2](torch.randn(4, decoder.num_patches, decoder.token_width, device=device))
    built[2].decoder_pred.weight.mul_(CONTRAST / pixels.std())
    shape = (dit.token_width, *dit.grid)
    return Networks(
        dit=built[0],
        guide=built[1],
        decoder=built[2],
        normalizer=LatentNormalizer(None, torch.ones(shape)).to(device),
    )


def loaded_networks(snapshot: Path, decoder: Path, device: torch.device) -> Networks:
    """Load networks of snapshots; the model guides itself where `guidance` is measured."""
    dit = load_dit(snapshot, device)
    assert dit.normalizer is not None
    model = dit.model.eval()
    return Networks(
        dit=model,
        guide=model,
        decoder=load_decoder(decoder, device).model.eval(),
        normalizer=dit.normalizer,
        shift_base=dit.meta.shift_base,
    )


class Program:
    """Networks made ready in one way, and the loop of `eval/generation.py` over them."""

    def __init__(self, networks: Networks, way: Way, device: torch.device, batch: int) -> None:
        self.way, self.device, self.batch = way, device, batch
        set_precision(way.precision)
        self.dit, self.guide, self.decoder = (
            copy.deepcopy(network) for network in (networks.dit, networks.guide, networks.decoder)
        )
        for network in (self.dit, self.guide, self.decoder):
            make_ready(network, way.precision, compiled=way.compiled)
        self.config = self.dit.config
        assert isinstance(self.config, LatentTransformerConfig)
        decoding = self.decoder.config
        assert isinstance(decoding, ViTDecoderConfig)
        self._networks = networks
        self._decoder = Decoder(network=self.decoder, precision=way.precision, image_size=decoding.image_size)
        self._made = 0

    def producer(self, **changes: Any) -> Producer:
        """Make the loop; `changes` are of the sampler, which takes 49 evaluations without guidance."""
        config = self.config
        sampler = LatentSampler(
            model=self.dit,
            latent_shape=(config.token_width, *config.grid),
            num_classes=config.num_classes,
            classes=tuple(range(config.num_classes)),
            shift_base=self._networks.shift_base,
            precision=self.way.precision,
            **{"points": POINTS, **changes},
        )
        return Producer(
            sampler=sampler,
            normalizer=self._networks.normalizer,
            decoder=self._decoder,
            device=self.device,
            batch_size=self.batch,
            fill_batches=self.way.compiled,
        )

    def rate(self, producer: Producer, batches: int) -> float:
        """Images a second of sampling, decoding and writing so many batches that were not made before."""
        count = batches * self.batch
        numbers = np.arange(self._made, self._made + count)
        self._made += count
        with tempfile.TemporaryDirectory() as folder:
            file = SamplesFile(Path(folder) / "samples.npz", self._made, self._decoder.image_size)
            file.create()
            begun = time.perf_counter()
            with file:
                producer.produce(numbers, file.write)
            return count / (time.perf_counter() - begun)

    def reference_rate(self, producer: Producer, batches: int) -> float:
        """Images a second with AutoGuidance as the reference runs it."""
        sampler, begun = producer.sampler, time.perf_counter()
        for first in range(0, batches * self.batch, self.batch):
            numbers = torch.arange(first, first + self.batch, device=self.device)
            with torch.inference_mode():
                images = self._as_the_reference(sampler, numbers)
            assert len(images.cpu().numpy()) == self.batch
        return batches * self.batch / (time.perf_counter() - begun)

    def _as_the_reference(self, sampler: LatentSampler, numbers: Tensor) -> Tensor:
        noise = torch.randn((len(numbers), *sampler.latent_shape), device=self.device)
        labels = torch.cat([numbers % sampler.num_classes, torch.full_like(numbers, sampler.num_classes)])

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with autocast(self.device, self.way.precision):
                better, worse = self.dit(x, t, labels), self.guide(x, t, labels)
            guided: Tensor = worse + SCALE * (better - worse)
            return guided

        latents = integrate(velocity, torch.cat([noise, noise]), sampler.grid).chunk(2)[0]
        return to_uint8(self._decoder.pixels(self._networks.normalizer.to_tokens(latents)))

    def forward_rate(self, calls: int, evaluations: int = POINTS - 1) -> float:
        """Images a second that the model's forward passes alone allow, in so many evaluations an image."""
        config = self.config
        x = torch.randn(self.batch, config.token_width, *config.grid, device=self.device)
        t, y = torch.rand(self.batch, device=self.device), torch.arange(self.batch, device=self.device)
        with torch.inference_mode(), self._timed() as seconds, autocast(self.device, self.way.precision):
            for _ in range(calls):
                self.dit(x, t, y % config.num_classes)
        return self.batch * calls / evaluations / seconds[0]

    def decoding_rate(self, calls: int) -> float:
        """Images a second of the decoder alone, in the batches that the loop gives it."""
        config = self.config
        size = min(self.batch, 32)
        tokens = torch.randn(size, config.grid[0] * config.grid[1], config.token_width, device=self.device)
        with self._timed() as seconds:
            for _ in range(calls):
                self._decoder.pixels(tokens)
        return size * calls / seconds[0]

    @contextmanager
    def _timed(self) -> Iterator[list[float]]:
        found: list[float] = []
        self._synchronise()
        begun = time.perf_counter()
        yield found
        self._synchronise()
        found.append(time.perf_counter() - begun)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
