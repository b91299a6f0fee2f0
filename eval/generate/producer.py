"""Sample, decode and hand over, one batch after the other; a device always has the next batch queued.

One thread gives the device all its work: a batch is sampled in one stream and, when that is done, decoded in another,
beside the sampling of the next batch. Nothing in a batch asks the device for a value. A second thread waits for the
images and hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.generate.sampler import LatentSampler
from eval.images.sheets import to_uint8
from eval.networks.load import Decoder
from eval.networks.transfer import mark, to_device
from shards import UserError
from train.models.normalizer import LatentNormalizer

Sink = Callable[[NDArray[np.int64], NDArray[np.uint8]], None]
"""sink(sample numbers [b], images uint8 [b, H, W, 3]); called in order, from one thread that is not the caller's.

One that raises torch.OutOfMemoryError must have taken in nothing: it is handed the samples again, in smaller batches.
"""

_FIRST_TRY = {"cuda": 256, "cpu": 32}
"""Batch size tried where none is given; halved until it fits."""
_DECODED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Producer:
    """Turn sample numbers into images."""

    sampler: LatentSampler
    normalizer: LatentNormalizer
    decoder: Decoder
    device: torch.device
    batch_size: int | None = None
    """Samples computed together; None: as many as fit."""
    fill_batches: bool = False
    """Let the networks see one batch size each, because they are compiled for it: batches are as even as they can be,
    and a short one repeats its last sample."""
    rounding: bool = False

    def produce(self, numbers: NDArray[np.int64], sink: Sink, progress: tqdm[Any] | None = None) -> None:
        """Make the samples `numbers` and hand them to `sink`.

        While a batch is waited for and handed over, the next is queued, and no further one. A batch that does not fit
        into memory is made again in smaller batches.

        Raises:
            UserError: Not even one sample, or not the batch size given, fits into memory.
        """
        size = self._first_size(len(numbers))
        # Samples handed over, and those queued as well.
        done = queued = 0
        handing: Future[torch.OutOfMemoryError | None] | None = None
        with ThreadPoolExecutor(max_workers=1) as second:
            while done < len(numbers):
                batch = numbers[queued : queued + size]
                images: _Images | None = None
                if len(batch):
                    try:
                        images = self._queued(batch, size)
                    except torch.OutOfMemoryError as error:
                        size = self._smaller(size, error)
                        continue
                if handing is not None:
                    shortage, handing = handing.result(), None
                    if shortage is not None:
                        images = None
                        size, queued = self._smaller(size, shortage), done
                        continue
                    if progress is not None:
                        progress.update(queued - done)
                    done = queued
                if images is not None:
                    handing = second.submit(_hand_over, batch, images, sink)
                    queued += len(batch)

    def _first_size(self, count: int) -> int:
        size = self.batch_size or _FIRST_TRY.get(self.device.type, 32)
        if not self.fill_batches or count == 0:
            return size
        return -(-count // -(-count // size))

    def _smaller(self, size: int, error: torch.OutOfMemoryError) -> int:
        if self.batch_size is not None or size == 1:
            raise UserError(
                f"a batch of {size} samples does not fit into the device's memory; give a smaller --batch-size"
            ) from error
        torch.cuda.empty_cache()
        return size // 2

    @torch.inference_mode()
    def _queued(self, batch: NDArray[np.int64], size: int) -> _Images:
        """Queue a batch's sampling and decoding, in parts of one size, and the copies of its images to the host."""
        latents = self.sampler.latents(to_device(self._filled(torch.from_numpy(batch), size), self.device))
        part_size = -(-size // -(-size // _DECODED_AT_ONCE))
        shape = (len(batch), *self.decoder.image_size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        with self._beside(latents):
            for target, part in zip(
                torch.split(images, part_size), torch.split(latents, part_size), strict=False
            ):
                tokens = self.normalizer.to_tokens(self._filled(part, part_size))
                decoded = to_uint8(self.decoder.pixels(tokens), rounding=self.rounding)
                target.copy_(decoded[: len(target)], non_blocking=True)
            return _Images(images, mark(self.device))

    def _filled(self, rows: Tensor, size: int) -> Tensor:
        if not self.fill_batches or len(rows) == size:
            return rows
        return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])

    @contextmanager
    def _beside(self, latents: Tensor) -> Iterator[None]:
        """On CUDA, compute in the decoder's stream, when the latents are there."""
        if self.device.type != "cuda":
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            latents.record_stream(self._stream)
            yield

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The stream images are decoded in, so that they do not queue behind the next batch's steps.

        One for all batches, because the allocator keeps what was freed in a stream for that stream alone.
        """
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Images:
    """Images uint8 [b, H, W, 3] on the host, which are there when the device has come to the mark."""

    pixels: Tensor
    arrived: torch.cuda.Event | None


def _hand_over(batch: NDArray[np.int64], images: _Images, sink: Sink) -> torch.OutOfMemoryError | None:
    """Wait for the images and hand them over; what is returned is the error of a sink without room for them."""
    try:
        if images.arrived is not None:
            images.arrived.synchronize()
        sink(batch, images.pixels.numpy())
    except torch.OutOfMemoryError as error:
        # Without the frames it came through, which hold the tensors that did not leave room.
        return error.with_traceback(None)
    return None
