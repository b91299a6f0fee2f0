"""Does training on noisy tokens make a decoder forgive errors in its tokens?

    python benchmarks/token_noise.py STORE [--steps 1500] [--out runs/benchmarks/token_noise] [further settings]

Trains two decoders alike but for --noise.tau, decodes the store's tokens with normal noise of 0 to 0.8 added, and
draws PSNR against noise (arXiv 2510.11690, section 4, on which this is modelled, measures FID of generated images).
Run again, it continues; with both runs finished it only measures. Words it does not know go to the trainer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shards import Store, open_store
from train.decoder import main as train_decoder
from train.models.dequantize import Dequantizer, stored_tensor
from train.randomness import normal
from train.weights.snapshot import load_snapshot

LEVELS = tuple(round(0.1 * i, 1) for i in range(9))
TAUS = (0.0, 0.8)


def psnr_by_noise(store: Store, snapshot: Path, num_images: int) -> list[float]:
    """Mean PSNR in dB of reconstructions from tokens with noise of each level."""
    decoder = load_snapshot(snapshot).model
    rows = store.valid_rows[np.linspace(0, len(store.valid_rows) - 1, num_images).astype(np.int64)]
    stored, images = (read_rows(store, field, rows) for field in ("tokens", "image"))
    tokens = Dequantizer.of(store)(stored_tensor(stored, store.recipe.dtype))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    noise = normal(0, "noise on tokens", torch.arange(num_images), tuple(tokens.shape[1:]))
    found = []
    with torch.inference_mode():
        for level in LEVELS:
            decoded = torch.cat([decoder(part) for part in (tokens + level * noise).split(32)]).clamp(0, 1)
            error = (decoded - pixels).square().flatten(1).mean(dim=1)
            found.append((-10 * torch.log10(error)).mean().item())
    return found


def read_rows(store: Store, field: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Rows of a field of the centre crops, as stored."""
    reader = store.reader("center", field)
    values = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, values)
    return values


def main() -> None:
    """Train, measure, and write table and chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/token_noise"))
    arguments, further = parser.parse_known_args()

    store = open_store(arguments.store)
    curves = {}
    for tau in TAUS:
        run = arguments.out / f"tau-{tau}"
        words = f"decoder-tiny --store {arguments.store} --out {run} --max-steps {arguments.steps} --noise.tau {tau}"
        train_decoder([*f"{words} --tracker none".split(), *further])
        snapshot = run / "snapshots/latest.safetensors"
        curves[tau] = psnr_by_noise(store, snapshot, min(arguments.images, len(store.valid_rows)))

    print("| noise on the tokens | trained without | trained with tau 0.8 |\n|---|---|---|")
    for level, without, with_noise in zip(LEVELS, *curves.values(), strict=True):
        print(f"| {level} | {without:.2f} dB | {with_noise:.2f} dB |")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for tau, curve in curves.items():
        axes.plot(LEVELS, curve, marker="o", label=f"trained with tau = {tau}")
    axes.set(xlabel="deviation of the noise added to the tokens", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out / "token_noise.png", dpi=120)
    (arguments.out / "token_noise.json").write_text(
        json.dumps({"levels": LEVELS, "steps": arguments.steps, "psnr": curves}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
