"""Copies between host and device beside the device's computing, and how long that took."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

Mark = torch.cuda.Event | float
"""A moment on a device, or where calls return only when all is done, on the clock."""


class Transfers:
    """The copies of one worker: on a GPU each direction has a stream of its own, elsewhere a copy is done on return.

    Args:
        device: Where the encoder computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.overlapped = device.type == "cuda"
        if self.overlapped:
            self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_device(self, inputs: Tensor) -> Tensor:
        """Copy inputs to the device; computations queued from now on wait for the copy, earlier ones do not."""
        if not self.overlapped:
            return inputs.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward):
            there = inputs.to(self._device, non_blocking=True)
        computing.wait_stream(self._inward)
        there.record_stream(computing)
        return there

    def to_host(self, copies: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy tensors into pinned memory once they are computed.

        Args:
            copies: Pairs of source on the device and target on the host.

        Returns:
            What happens when all are there; None if they are.
        """
        if not self.overlapped:
            for source, target in copies:
                target.copy_(source)
            return None
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._outward):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                source.record_stream(self._outward)
            event.record(self._outward)
        return event

    def mark(self) -> Mark:
        """Return the moment when the device has done what it was asked to compute so far."""
        if not self.overlapped:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def seconds_between(begun: Mark, done: Mark) -> float:
    """Return the seconds from one moment to another, both past."""
    if isinstance(begun, torch.cuda.Event) and isinstance(done, torch.cuda.Event):
        milliseconds: float = begun.elapsed_time(done)
        return milliseconds / 1000
    assert isinstance(begun, float)
    assert isinstance(done, float)
    return done - begun
