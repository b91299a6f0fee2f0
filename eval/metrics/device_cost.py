"""What a computation costs on this device: seconds, peak memory, and joules where the device counts them."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Measured cost of one call."""

    seconds: float
    """Median over the calls."""
    calls: int
    """Calls measured."""
    peak_memory: int | None
    """Bytes allocated on the device at most; None on a CPU, where torch does not count them."""
    joules: float | None
    """Mean energy a call, of the whole device; None where it reports none."""


def measure(
    work: Callable[[], object], device: torch.device, *, least_seconds: float = 2.0, least_calls: int = 3
) -> Cost:
    """Call `work` until both minima are reached, after one call that is not counted.

    Args:
        work: The computation; it may return before the device is done.
        device: Where it runs.
        least_seconds: Time to measure at least.
        least_calls: Calls to measure at least.
    """
    work()
    _finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    energy, began = energy_counter(device), time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < least_calls or time.perf_counter() - began < least_seconds:
        start = time.perf_counter()
        work()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    used = energy_counter(device)
    return Cost(
        seconds=statistics.median(seconds),
        calls=len(seconds),
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        joules=None if energy is None or used is None else (used - energy) / len(seconds),
    )


def energy_counter(device: torch.device) -> float | None:
    """Return the joules the device has used since a fixed moment; None where it does not say, or may not be asked."""
    return _gpu_energy(device) if device.type == "cuda" else _cpu_energy()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_energy() -> float | None:
    """Return the energy of all processor packages by Intel's and AMD's running average power limit counters."""
    counters = [path / "energy_uj" for path in _RAPL.glob("intel-rapl:?")]
    try:
        readings = [int(counter.read_text()) for counter in counters]
    except OSError:  # readable by root alone on most systems
        return None
    return sum(readings) * 1e-6 if readings else None


def _gpu_energy(device: torch.device) -> float | None:
    """Return energy counter of a GPU of NVIDIA's Volta generation or later.

    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded).
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value * 1e-3
