"""From the store to the device: the loader's host buffers become tensors one micro-batch ahead of the computation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Batch, Loader, Store
from train.distributed import Team
from train.engine.resident import ResidentTokens
from train.models.dequantize import stored_tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A process's samples of one forward and backward pass, on its device."""

    step: int
    """Optimizer step the samples belong to, counted from 0."""
    rows: NDArray[np.int64]
    """[b] rows of the store, in host memory."""
    positions: Tensor
    """int64 [b]: places in the endless stream of samples; every random draw depends on them alone."""
    labels: Tensor
    """int64 [b]: classes; -1 where there is none."""
    fields: dict[str, Tensor]
    """Arrays as stored: tokens [b, N, D], image uint8 [b, H, W, 3]; on a CPU valid until the next micro-batch."""
    last_of_step: bool
    """Whether the optimizer steps after this one."""

    def copied(self) -> MicroBatch:
        """Return the same micro-batch in memory of its own where the loader would reuse it."""
        if self.positions.is_cuda:
            return self
        return replace(self, fields={name: field.clone() for name, field in self.fields.items()})

    def __len__(self) -> int:
        return len(self.rows)


class Feed:
    """Micro-batches on the device, without end.

    On CUDA the next micro-batch is copied from pinned memory on a stream of its own while the current one is computed.
    The loader gets a buffer back as soon as its copy is complete. On a CPU the tensors are the loader's own buffers.
    Tokens that are resident are gathered on the device instead.

    Attributes:
        data_wait: seconds this process has spent on getting micro-batches rather than on what it does with them.
    """

    def __init__(
        self,
        store: Store,
        team: Team,
        *,
        fields: tuple[str, ...],
        views: tuple[str, ...],
        rows: NDArray[np.int64] | None = None,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        start_sample: int,
        threads: int,
        resident: ResidentTokens | None = None,
    ) -> None:
        self.data_wait = 0.0
        self._resident = resident
        if resident is not None:
            fields = tuple(field for field in fields if field != "tokens")
        self._device = team.device
        self._on_cuda = team.device.type == "cuda"
        self._stream = torch.cuda.Stream(team.device) if self._on_cuda else None  # type: ignore[no-untyped-call]
        self._loader = Loader(
            store,
            fields=fields,
            views=views,
            rows=rows,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=team.rank,
            world_size=team.world_size,
            micro_batch_size=micro_batch_size,
            start_sample=start_sample,
            threads=threads,
            allocate=self._allocate,
        )
        # Images are uint8 and need no name.
        self._logical = {"tokens": store.recipe.dtype} | {
            name: store.field(name).recipe.dtype for name in fields if name in store.added_fields
        }

    def close(self) -> None:
        """Stop the reading threads."""
        self._loader.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        batches = self._copies() if self._on_cuda else self._buffers()
        while True:
            begun = time.perf_counter()
            batch = next(batches)
            self.data_wait += time.perf_counter() - begun
            yield batch

    def _buffers(self) -> Iterator[MicroBatch]:
        """Yield micro-batches in the loader's own memory."""
        before: Batch | None = None
        for batch in self._loader:
            micro = self._assemble(
                batch, {name: self._tensor(name, array) for name, array in batch.arrays.items()}
            )
            # Last, because it wakes the reading threads, which then compete for the interpreter.
            if before is not None:
                before.release()
            before = batch
            yield micro

    def _copies(self) -> Iterator[MicroBatch]:
        """Yield micro-batches copied to the device, one ahead."""
        batches = iter(self._loader)
        ready, done, held = self._copied(next(batches))
        while True:
            following = self._copied(next(batches))
            torch.cuda.current_stream(self._device).wait_event(done)
            for tensor in (ready.positions, ready.labels, *ready.fields.values()):
                # The copy was made on another stream; the allocator must not reuse it while this one computes.
                tensor.record_stream(torch.cuda.current_stream(self._device))
            yield ready
            done.synchronize()
            held.release()
            ready, done, held = following

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return host memory the device can copy from by itself."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._on_cuda)
        return memory.numpy().view(dtype).reshape(shape)

    def _copied(self, batch: Batch) -> tuple[MicroBatch, torch.cuda.Event, Batch]:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            fields = {
                name: self._tensor(name, array).to(self._device, non_blocking=True)
                for name, array in batch.arrays.items()
            }
            micro = self._assemble(batch, fields)
            done.record()
        return micro, done, batch

    def _tensor(self, name: str, array: NDArray[Any]) -> Tensor:
        return stored_tensor(array, self._logical.get(name, "uint8"))

    def _assemble(self, batch: Batch, fields: dict[str, Tensor]) -> MicroBatch:
        if self._resident is not None:
            fields = {"tokens": self._resident.gather(batch), **fields}
        return MicroBatch(
            step=batch.step,
            rows=batch.rows.copy(),
            positions=torch.from_numpy(batch.positions).to(self._device, non_blocking=True),
            labels=torch.from_numpy(batch.labels.astype(np.int64)).to(self._device, non_blocking=True),
            fields=fields,
            last_of_step=batch.last_of_step,
        )
