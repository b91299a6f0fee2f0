"""The devices of this machine."""

import torch

from shards import UsageError


def named_devices(text: str) -> list[torch.device]:
    """Return devices by name, such as `cuda:0,cuda:1` or `cpu,cpu`; `auto` is every visible GPU, else one CPU process.

    Raises:
        UsageError: If one of them is not there.
    """
    if text == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    devices = []
    for name in text.split(","):
        try:
            device = torch.device(name.strip())
        except RuntimeError:
            raise UsageError(f"--devices must name cpu, cuda:N or mps, got {name.strip()!r}") from None
        if not _is_there(device):
            raise UsageError(
                f"--devices names {device}, which this machine does not have; such as --devices cpu"
            )
        devices.append(device)
    return devices


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"


def precision_for(devices: list[torch.device], wanted: str) -> str:
    """`wanted`, or for `auto` what suits the devices: bfloat16 on GPUs, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if all(device.type == "cuda" for device in devices) else "float32"
