"""How the encoder is run: images a call and compiled or not, chosen when a store is begun and kept by all who write it.

Matrix products round differently at another batch size, and compiled code differently from eager code, so the choice
is part of the store's recipe. It decides about rounding alone and is no part of the recipe's identity.
"""

import time
from collections.abc import Callable, Iterable

import torch

from pipeline.console import log
from pipeline.encode.devices import named_devices
from pipeline.encoders.frozen import Encoder
from pipeline.encoders.latents import RowEncoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crops import default_crop
from shards import Execution, Recipe, UsageError, UserError
from shards.metadata.layout import ROOT
from shards.metadata.root import read_recipe

DEFAULT_BATCH = 64
"""Images a call on a processor, and in stores whose recipe says nothing."""

_LATENT_BATCH = 256
"""Rows a call of a compressor on a GPU: it is small, and a call has to be worth its launches."""

_BATCHES = (64, 128, 256, 512)
_WORTH_MORE = 1.02  # a larger batch must be so much faster: it takes memory, and longer to fill
_TIMED_SECONDS = 0.3
_COMPILE_SECONDS = 60.0
_COMPILED_GAIN = 1.35
"""DINOv2-B on one H100 (torch 2.11, bfloat16): 5,550 images/s eager, 7,650 compiled."""


def execution_of(recipe: Recipe, config: EncodeConfig) -> Execution:
    """Return how everybody who writes a store runs the encoder.

    Raises:
        UsageError: If the options ask for something else than the store was begun with.
    """
    asked_batch, asked_compile = config.work.batch_size, config.encoder.compile
    begun = recipe.execution
    if begun is None:  # stores of earlier versions took what each command said
        return Execution(batch_size=asked_batch or DEFAULT_BATCH, compiled=asked_compile == "on")
    differences = []
    if asked_batch not in (None, begun.batch_size):
        differences.append(f"--batch-size {begun.batch_size}, not {asked_batch}")
    if asked_compile not in ("auto", "on" if begun.compiled else "off"):
        differences.append(f"--compile {'on' if begun.compiled else 'off'}, not {asked_compile}")
    if differences:
        raise UsageError(
            f"{config.store.out} was begun with {' and '.join(differences)}: tokens are rounded by it; leave the "
            "option out, or name another --out"
        )
    return begun


def choose_execution(config: EncodeConfig, recipe: Recipe, encoder: RowEncoder) -> Execution | None:
    """Return how the encoder is run for a store: as it was begun, else as the options say, else as suits the device.

    Args:
        config: Settings.
        recipe: What the store will hold.
        encoder: On the CPU, where it is again afterwards.

    Returns:
        None for a store that was begun by a version that recorded nothing.
    """
    if (config.store.out / ROOT).exists():
        begun = read_recipe(config.store.out)
        execution_of(begun, config)
        return begun.execution
    device = named_devices(config.work.devices)[0]
    batch_size, compiled = config.work.batch_size, config.encoder.compile
    if device.type != "cuda" or not isinstance(encoder, Encoder) or (batch_size and compiled != "auto"):
        usual = DEFAULT_BATCH if device.type != "cuda" or isinstance(encoder, Encoder) else _LATENT_BATCH
        return Execution(batch_size=batch_size or usual, compiled=compiled == "on")
    encoder.to_device(device, recipe.precision)
    batches = _BATCHES if batch_size is None else (batch_size,)
    found, rate = fastest_batch(batches, lambda size: _measured_rate(encoder, recipe, size))
    encoder.to_device(torch.device("cpu"), recipe.precision)
    torch.cuda.empty_cache()
    if compiled == "auto":
        num_devices = len(named_devices(config.work.devices))
        repaid, line = compiling_repays(recipe.num_images * len(recipe.views), rate, num_devices)
        log(line)
    else:
        repaid = compiled == "on"
    log(f"{found} images a call: {rate:,.0f} images/s on {torch.cuda.get_device_name(device)}, not compiled")
    return Execution(batch_size=found, compiled=repaid)


def fastest_batch(sizes: Iterable[int], rate_of: Callable[[int], float | None]) -> tuple[int, float]:
    """Return the smallest batch beyond which the encoder hardly gets faster, and its rate.

    Args:
        sizes: Candidates, ascending.
        rate_of: Images a second at a batch size; None if the device's memory does not hold it.

    Raises:
        UserError: If the memory holds not even the smallest.
    """
    best: tuple[int, float] | None = None
    for size in sizes:
        rate = rate_of(size)
        if rate is None or (best is not None and rate < best[1] * _WORTH_MORE):
            break
        best = size, rate
    if best is None:
        raise UserError("the device's memory does not hold one batch; give a smaller --batch-size")
    return best


def compiling_repays(num_images: int, rate: float, num_devices: int) -> tuple[bool, str]:
    """Return whether compiling takes less time than it saves, and a line that says so.

    Args:
        num_images: Images to encode, each view counted.
        rate: Images a second that one device encodes without.
        num_devices: Devices, each of which compiles for itself.
    """
    seconds = num_images / rate / num_devices
    saved = seconds * (1 - 1 / _COMPILED_GAIN)
    repaid = saved > _COMPILE_SECONDS
    line = (
        f"the encoder is {'' if repaid else 'not '}compiled: {num_images:,} images take {seconds:,.0f} s without, "
        f"compiling about {_COMPILE_SECONDS:.0f} s, and it saves about {saved:,.0f} s (--compile "
        f"{'off' if repaid else 'on'} for the other way)"
    )
    return repaid, line


def _measured_rate(encoder: Encoder, recipe: Recipe, size: int) -> float | None:
    side = recipe.image_size or default_crop(recipe.encoder)
    try:
        pixels = torch.zeros((size, 3, side, side), dtype=torch.uint8, device=encoder.device)
        encoder.encode(pixels)
        torch.cuda.synchronize(encoder.device)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < _TIMED_SECONDS:
            encoder.encode(pixels)
            torch.cuda.synchronize(encoder.device)
            count += size
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return count / (time.perf_counter() - began)
