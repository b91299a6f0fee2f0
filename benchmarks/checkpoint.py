"""How fast the state of a DiT-DH run is saved, against writing and flushing as many bytes.

    python benchmarks/checkpoint.py [--size xl] [--folder DIR]

Weights, running average and moments are saved as the trainer saves them; the other way is `write` of the
same number of bytes from memory and one `fsync`. Both run in turns. A size that does not fit into memory is told by the
ratio of a smaller one: what is saved grows with the parameters alone. Prints a line a round and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from train.engine.checkpoint import Parts, save_checkpoint
from train.engine.ema import WeightAverages
from train.engine.optimizer import make_optimizer
from train.engine.state import state_parts
from train.models.build import build_model
from train.models.config import dit_dh_config
from train.settings.config import OptimizerSettings

PIECE = 1 << 24
XL_BYTES = 13.4e9
"""State of DiT-DH-XL with one average."""


def make_parts(size: str, device: torch.device) -> Parts:
    """Return the state of a run that has taken a step."""
    with torch.device(device):
        model = build_model(dit_dh_config(size, token_width=768, grid=(16, 16), num_classes=1000))
    optimizer = make_optimizer(model, OptimizerSettings())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return state_parts(model, WeightAverages(model, (0.9995,)), optimizer)


def raw_seconds(path: Path, nbytes: int) -> float:
    """Seconds to write and flush so many bytes."""
    piece = np.random.default_rng(0).integers(0, 256, PIECE, np.uint8).data
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, PIECE):
            file.write(piece[: min(PIECE, nbytes - start)])
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - begun
    path.unlink()
    return elapsed


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="b", choices=["s", "b", "l", "xl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = make_parts(arguments.size, device)
    nbytes = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    print(f"DiT-DH-{arguments.size.upper()} on {device}: {nbytes / 1e9:.2f} GB")
    seconds: dict[str, list[float]] = {"raw": [], "checkpoint": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for turn in range(arguments.rounds):
            seconds["raw"].append(raw_seconds(Path(folder) / "raw", nbytes))
            begun = time.perf_counter()
            saved = save_checkpoint(Path(folder) / "checkpoints", turn, parts, {})
            seconds["checkpoint"].append(time.perf_counter() - begun)
            shutil.rmtree(saved)
            print(", ".join(f"{name} {nbytes / s[-1] / 1e9:.2f} GB/s" for name, s in seconds.items()))
    ratio = statistics.median(a / b for a, b in zip(seconds["raw"], seconds["checkpoint"], strict=True))
    xl = XL_BYTES / nbytes * statistics.median(seconds["checkpoint"])
    print(f"{ratio:.2f} of a raw write's speed; XL's {XL_BYTES / 1e9:.1f} GB take {xl:.1f} s at this speed")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "size": arguments.size,
        "device": str(device),
        "bytes": nbytes,
        "seconds": seconds,
        "ratio": ratio,
    }
    arguments.out.write_text(json.dumps({**found, "xl_seconds": xl}, indent=1) + "\n")


if __name__ == "__main__":
    main()
