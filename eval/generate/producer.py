"""Sample, decode and hand over, one batch after the other, with decoding beside the next batch's sampling."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from shards import UserError
from train.models.normalizer import LatentNormalizer

Sink = Callable[[NDArray[np.int64], NDArray[np.uint8]], None]
"""sink(sample numbers [b], images uint8 [b, H, W, 3]); called from one thread, in order.

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
    """Repeat samples to fill a short batch, because the compiled networks know one size."""
    rounding: bool = False

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The stream images are decoded in, so that they do not queue behind the next batch's steps.

        One for all batches, because the allocator keeps what was freed in a stream for that stream alone.
        """
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def produce(self, numbers: NDArray[np.int64], sink: Sink, progress: tqdm[Any] | None = None) -> None:
        """Make the samples `numbers` and hand them to `sink`.

        A batch is decoded and handed over in a second thread, on CUDA in a second stream, while the next one
        is sampled; at most one is in flight. One that does not fit into memory, in either thread, is made again in
        smaller batches.

        Raises:
            UserError: Not even one sample, or not the batch size given, fits into memory.
        """
        size = self.batch_size or _FIRST_TRY.get(self.device.type, 32)
        # Samples handed over, and those sampled as well: the ones between are in flight.
        done = sampled = 0
        finishing: Future[torch.OutOfMemoryError | None] | None = None
        with ThreadPoolExecutor(max_workers=1) as finisher:
            while done < len(numbers):
                batch = numbers[sampled : sampled + size]
                latents: Tensor | None = None
                if len(batch):
                    try:
                        latents = self._latents(batch, size)
                    except torch.OutOfMemoryError as error:
                        size = self._smaller(size, error)
                        continue
                ready = self._mark()
                if finishing is not None:
                    shortage, finishing = finishing.result(), None
                    if shortage is not None:
                        del latents
                        size, sampled = self._smaller(size, shortage), done
                        continue
                    if progress is not None:
                        progress.update(sampled - done)
                    done = sampled
                if latents is not None:
                    finishing = finisher.submit(self._finish, batch, latents, ready, sink)
                    sampled += len(batch)

    def _latents(self, batch: NDArray[np.int64], size: int) -> Tensor:
        wanted = batch
        if self.fill_batches and len(batch) < size:
            wanted = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch))])
        return self.sampler.latents(torch.from_numpy(wanted).to(self.device))[: len(batch)]

    def _smaller(self, size: int, error: torch.OutOfMemoryError) -> int:
        if self.batch_size is not None or size == 1:
            raise UserError(
                f"a batch of {size} samples does not fit into the device's memory; give a smaller --batch-size"
            ) from error
        torch.cuda.empty_cache()
        return size // 2

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _finish(
        self, batch: NDArray[np.int64], latents: Tensor, ready: torch.cuda.Event | None, sink: Sink
    ) -> torch.OutOfMemoryError | None:
        """Decode and hand over; what is returned is the error of a batch that does not fit."""
        try:
            if ready is None:
                images = self._images(latents)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(ready)
                    latents.record_stream(self._stream)
                    images = self._images(latents)
            sink(batch, images)
        except torch.OutOfMemoryError as error:
            # Without the frames it came through, which hold the tensors that did not leave room.
            return error.with_traceback(None)
        return None

    @torch.inference_mode()
    def _images(self, latents: Tensor) -> NDArray[np.uint8]:
        parts = [
            to_uint8(self.decoder.pixels(self.normalizer.to_tokens(part)), rounding=self.rounding).cpu()
            for part in torch.split(latents, _DECODED_AT_ONCE)
        ]
        return torch.cat(parts).numpy()
