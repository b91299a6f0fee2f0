"""`pipeline encode --dry-run`: what a run would read, write and take, before anything is written."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import show
from pipeline.encode.buffers import page_aligned
from pipeline.encode.claims import Task
from pipeline.encode.decoding import BatchDecoder, DecodedBatch, batch_length
from pipeline.encode.devices import named_devices
from pipeline.encode.execution import DEFAULT_BATCH
from pipeline.encode.job import decode_threads_for
from pipeline.encode.limits import Limits
from pipeline.encode.space import gigabytes
from pipeline.encode.sums import sums_for
from pipeline.encode.targets import companion_encoders, companion_paths
from pipeline.encode.tokens import TORCH_TYPES, as_numpy
from pipeline.encoders.aggregation import Aggregation
from pipeline.encoders.frozen import Encoder
from pipeline.settings.config import EncodeConfig
from pipeline.sources.crop_sources import crop_source
from shards import (
    TOKEN_DTYPES,
    Plan,
    Recipe,
    RowSums,
    even_spread,
    printable_text,
    storage_type,
    try_writing,
    usable_cores,
)
from shards.metadata.layout import fields_of
from shards.storage.location import free_bytes, local_path

_SAMPLE = 256
_TIMED_SECONDS = 2.0
_TRIED_ROWS = 64
_BAD_NAMED = 5


def preflight(config: EncodeConfig, plan: Plan, recipe: Recipe, encoder: Encoder) -> None:
    """Print rows, classes, sampled decode errors, bytes against free space, and hours on this kind of device."""
    device = named_devices(config.work.devices)[0]
    sample = _sample_of(plan)
    batches, decode_rate = _decode(config, recipe, plan, sample)
    bad = [
        (plan.keys[index], row.reason)
        for batch in batches
        for index, row in zip(sample[batch.first_slot :], batch.rows(), strict=False)
        if row.reason is not None
    ]
    companions = companion_encoders(config, encoder)
    encode_rate = _encode_rate(
        encoder.to_device(device, recipe.precision),
        [encoder.aggregation, *(companion.aggregation for companion in companions.values())],
        batches[0].inputs[0],
        recipe,
    )
    limits = _limits(config, recipe, batches[0], encoder, decode_rate, encode_rate)
    lines = [
        f"images      {plan.num_images} in {len(plan.class_names) or 'no'} classes, {plan.num_shards} "
        "shards of "
        f"{plan.shard_size(0)} rows or one less",
        f"unusable    {len(bad)} of {len(sample)} sampled images",
        *(f"            {key}: {reason}" for key, reason in bad[:_BAD_NAMED]),
        *_sizes(config, recipe),
        f"speed       this device encodes {encode_rate:.1f} images/s in all views; "
        f"{usable_cores()} cores decode {decode_rate:.1f} images/s",
        f"limit       {limits.named}",
        "time        "
        + ", ".join(f"{count} devices {_hours(plan, encode_rate, count)}" for count in (1, 8, 64)),
        f"            to keep one device busy takes {encode_rate / decode_rate * usable_cores():.1f} such "
        "cores",
    ]
    show("\n".join(printable_text(line) for line in lines))


def _sample_of(plan: Plan) -> NDArray[np.int64]:
    """Return the places of up to `_SAMPLE` images spread evenly over the plan, which is shuffled."""
    return even_spread(_SAMPLE, plan.num_images)


def _decode(
    config: EncodeConfig, recipe: Recipe, plan: Plan, sample: NDArray[np.int64]
) -> tuple[list[DecodedBatch], float]:
    """Return the decoded sample, and images decoded a second on all cores."""
    source = crop_source(config, recipe, recipe.views, plan)
    decoder = BatchDecoder(
        source,
        length=batch_length(len(sample), config.work.batch_size or DEFAULT_BATCH),
        threads=decode_threads_for(config, 1),
    )
    records = plan.records(sample)
    began = time.perf_counter()
    batches = list(decoder.batches(Task(0, recipe.views), records))
    for batch in batches:
        batch.rows()
    seconds = time.perf_counter() - began
    decoder.close()
    source.close()
    return batches, len(records) / seconds


def _encode_rate(
    encoder: Encoder, aggregations: Sequence[Aggregation], images: Tensor, recipe: Recipe
) -> float:
    """Measure images a second through the encoder in all views, on batches that are ready."""
    pixels = images.permute(0, 3, 1, 2).to(encoder.device)

    def encode() -> None:
        for output in encoder.encode_all(pixels, aggregations, class_token=recipe.class_token):
            output.tokens.cpu()

    encode()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _TIMED_SECONDS:
        encode()
        count += len(images)
    return count / (time.perf_counter() - began) / len(recipe.views)


def _limits(
    config: EncodeConfig,
    recipe: Recipe,
    batch: DecodedBatch,
    encoder: Encoder,
    decode_rate: float,
    encode_rate: float,
) -> Limits:
    """Measure what each stage of one worker on this machine can reach; a server as --out is not tried."""
    rates = {"decode": decode_rate, "device": encode_rate}
    folder = local_path(config.store.out)
    if folder is not None:
        folder = folder.absolute()
        while not folder.is_dir():
            folder = folder.parent
        count = min(_TRIED_ROWS, batch.inputs.shape[1])
        shape = (count, recipe.encoder.num_tokens, recipe.encoder.width)
        tokens = page_aligned(shape, TORCH_TYPES[recipe.dtype], pin_memory=False).zero_()
        # The images that are stored are what all views but mirrored ones show; each view has a writer of its own.
        arrays = {"tokens": as_numpy(tokens)}
        if recipe.image_size:
            arrays["image"] = batch.inputs[0, :count].numpy()
        sums = sums_for(recipe, torch.device("cpu")) or RowSums(shape[1:], storage_type(recipe.dtype))
        found = try_writing(folder, arrays, sums, recipe.object_digest, _TIMED_SECONDS)
        rates |= {"writer": found.writer, "disk": found.disk / len(recipe.views)}
    return Limits(rates)


def _sizes(config: EncodeConfig, recipe: Recipe) -> list[str]:
    values = recipe.encoder.num_tokens * recipe.encoder.width
    tokens = {name: values * storage_type(name).numpy.itemsize * recipe.num_images for name in TOKEN_DTYPES}
    fields = [field for view in recipe.views for field in fields_of(recipe, view)]
    of_images = sum(field.row_nbytes for field in fields if field.name == "image") * recipe.num_images
    of_tokens = sum(field.row_nbytes for field in fields if field.name != "image") * recipe.num_images
    companions = companion_paths(config)
    # Companions share the images' files where the file system can do that.
    needed = of_images + of_tokens * (1 + len(companions))
    free = free_bytes(config.store.out)
    if free is None:
        room = "a server does not say how much is free"
    else:
        room = f"free {gigabytes(free)}: {'enough' if needed < free else 'NOT ENOUGH'}"
    return [
        "a view      " + ", ".join(f"{name} {gigabytes(size)}" for name, size in tokens.items()),
        f"store       {len(recipe.views)} views as {recipe.dtype}"
        + (f", the same again as {', '.join(companions)}," if companions else "")
        + f" and images of {recipe.image_size} px: "
        f"{gigabytes(needed)}; {room}",
    ]


def _hours(plan: Plan, rate: float, devices: int) -> str:
    return f"{plan.num_images / rate / devices / 3600:.3g} h"
