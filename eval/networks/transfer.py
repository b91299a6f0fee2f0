"""From the host to a device, and back, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; what is computed with it there is queued behind the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory makes the host wait for what the device does before it.
    return tensor.pin_memory().to(device, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Put a mark behind what the current stream has queued, to wait for without using a core; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
