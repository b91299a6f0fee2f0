"""How float32 matrix products and convolutions are computed: whole, or on CUDA with TensorFloat-32's short mantissa.

torch keeps two switches for the whole process: one for matrix products, off unless it is asked for, and one for
cuDNN's convolutions, on unless it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_tf32(*, allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 in float32 matrix products and convolutions of this process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def whole_float32(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Within this context float32 is computed as float32, without TensorFloat-32 and without autocast.

    The switches are the process's: what another thread computes meanwhile is computed so too.

    Args:
        device: where it is computed.
        tf32: allow TensorFloat-32 after all.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(allowed=tf32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
