"""Memory on the host that batches are read into and tokens are copied to, reused batch after batch."""

import math

import torch
from torch import Tensor

PAGE = 4096
"""What disks take without a copy begins and ends at multiples of this (`shards.storage.file_writer`)."""


def page_aligned(shape: tuple[int, ...], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Return uninitialised memory that begins at a page.

    Args:
        shape: Shape of the tensor.
        dtype: Its type.
        pin_memory: Put it where a GPU can fetch and fill it by itself.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=pin_memory)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)
