"""Train RAE's recipe, RAEv2's, and RAEv2's without each of its parts, for equal FLOPs on the demo's photographs.

    python benchmarks/recipes.py                       # 1500 steps of RAE's, three seeds: hours on two cores
    python benchmarks/recipes.py --steps 300 --points 3     # a shorter look

Each run is an ordinary run of train/dit.py with a share of the images held out. At some of its steps samples are drawn
from the averaged weights, and the Fréchet distance of their tokens to the held-out images' is taken: in the store's own
feature space, without any decoder. Internal guidance costs no training, so it is a second reading of RAEv2's runs.

Run the same command again to continue: what is finished stays. Writes recipes.json, recipes.md and recipes.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.generate.sampler import LatentSampler
from eval.metrics.moments import FeatureMoments, Gaussian
from eval.metrics.set_distances import frechet_distance
from shards import Store, open_store
from train.engine.held_out import split_rows
from train.models.cost import forward_flops
from train.settings.networks import dit_config
from train.settings.presets import dit_settings
from train.weights.snapshot import load_snapshot

ROOT = Path(__file__).parents[1]
BATCH = 32
SAMPLED_AT_ONCE = 64


@dataclass(frozen=True)
class Variant:
    """A recipe: a preset of train/dit.py, what is changed of it, and how it is sampled."""

    label: str
    preset: str
    changes: tuple[str, ...] = ()
    trained_as: str | None = None
    """Another variant whose runs are read, where only the sampling differs."""
    guidance_scale: float | None = None
    """Of internal guidance at every time."""


VARIANTS = {
    "v1": Variant("RAE: DiT-DH, velocity, AdamW", "dit-dh-tiny"),
    "v1-muon": Variant("RAE with Muon", "dit-dh-tiny", ("--optimizer.kind", "muon")),
    "v2": Variant("RAEv2: tokens, data, base output, Muon", "raev2-tiny"),
    "v2-velocity": Variant(
        "RAEv2 that predicts the velocity",
        "raev2-tiny",
        ("--flow.prediction", "velocity", "--flow.time-floor", "0"),
    ),
    "v2-no-base": Variant("RAEv2 without a base output", "raev2-tiny", ("--model.base-depth", "None")),
    "v2-adamw": Variant("RAEv2 with AdamW", "raev2-tiny", ("--optimizer.kind", "adamw")),
    "v2-internal": Variant(
        "RAEv2 with internal guidance, 1.5", "raev2-tiny", trained_as="v2", guidance_scale=1.5
    ),
}


def main() -> int:
    """Run what is missing, measure, and write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipes"))
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of v1; others get its FLOPs")
    parser.add_argument("--points", type=int, default=5, help="measurements a run, evenly spread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    store = open_store(demo_store(asked.out))
    results: dict[str, Any] = {}
    for seed in range(asked.seeds):
        for name in asked.variants:
            results.setdefault(name, {})[seed] = run(asked, store, name, seed)
            write_report(asked, store, results)
    return 0


def demo_store(out: Path) -> Path:
    """Return the demo's photographs, encoded by its little encoder with random weights, as `make demo` does."""
    path = out / "store"
    photographs = ROOT / "data/demo/photographs"
    if not (path / "manifest.json").exists():
        call([sys.executable, "-m", "pipeline.demo", "photographs", str(photographs)], os.cpu_count() or 1)
        sizes = ["--input-size", "96", "--encoder-args", "patch_size=12", "--image-size", "96"]
        call(
            [
                *[sys.executable, "-m", "pipeline", "encode", str(photographs), "--out", str(path)],
                *[
                    "--shards",
                    "16",
                    "--encoder",
                    "test_vit",
                    "--weights",
                    "random:0",
                    *sizes,
                    "--views",
                    "center",
                ],
            ],
            os.cpu_count() or 1,
        )
    return path


def run(asked: argparse.Namespace, store: Store, name: str, seed: int) -> dict[int, float]:
    """Train a variant to its end, if it has not come there, and measure it: distance by step."""
    variant = VARIANTS[name]
    folder = asked.out / f"{variant.trained_as or name}-steps-{asked.steps}-seed-{seed}"
    steps = equal_steps(store, variant, asked.steps)
    every = max(1, steps // asked.points)
    end = every * asked.points
    rest = [
        "--milestone-every",
        every,
        "--checkpoint-every",
        every,
        "--snapshot-every",
        end,
        "--log-every",
        every,
    ]
    call(
        [
            *[
                sys.executable,
                "train/dit.py",
                variant.preset,
                "--store",
                str(store.path),
                "--out",
                str(folder),
            ],
            *["--max-steps", str(end), "--global-batch-size", str(BATCH), "--seed", str(seed)],
            # Averages over an eighth of the run, whatever its length: 0.995 of the presets for 1500 steps.
            *["--ema-rates", f"{1 - 8 / max(9, end):.4f}", "--held-out", str(asked.held_out)],
            *["--tracker", "none", *map(str, rest), *variant.changes],
        ],
        asked.threads,
    )
    reference = held_out_tokens(store, asked.held_out, seed)
    return {
        step: distance(folder / f"snapshots/step-{step:08d}.safetensors", variant, reference, asked, seed)
        for step in range(every, end + 1, every)
    }


def equal_steps(store: Store, variant: Variant, steps: int) -> int:
    """Optimizer steps that cost what `steps` of v1 cost."""
    ours, theirs = (
        forward_flops(dit_config(dit_settings(preset).model, store))
        for preset in (VARIANTS["v1"].preset, variant.preset)
    )
    return round(steps * ours / theirs)


def held_out_tokens(store: Store, held_out: int, seed: int) -> Gaussian:
    """Return the normal distribution that stands for the tokens of the images that a run has never seen."""
    _, rows = split_rows(store.valid_rows, held_out, seed=seed)
    reader = store.reader("center", "tokens")
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    return gaussian(out.astype(np.float32))


def gaussian(tokens: NDArray[np.float32]) -> Gaussian:
    """Of tokens float32 [n, N, D], all places of all images alike."""
    return FeatureMoments.of(tokens.reshape(-1, tokens.shape[-1])).gaussian()


def distance(
    path: Path, variant: Variant, reference: Gaussian, asked: argparse.Namespace, seed: int
) -> float:
    """Fréchet distance of generated to held-out tokens; kept beside the snapshot."""
    kept = path.with_suffix(f".{asked.samples}-{asked.sampling_steps}-{variant.guidance_scale or 1:g}.json")
    if kept.exists():
        return float(json.loads(kept.read_text())["distance"])
    snapshot = load_snapshot(path)
    config, meta = snapshot.config, snapshot.meta
    assert snapshot.normalizer is not None
    sampler = LatentSampler(
        model=snapshot.model,
        latent_shape=(config.token_width, *config.grid),
        num_classes=config.num_classes,
        classes=tuple(range(config.num_classes)),
        seed=seed,
        kind="to-zero",
        points=asked.sampling_steps + 1,
        shift_base=meta.shift_base,
        prediction=meta.prediction,
        time_floor=meta.time_floor,
        guidance="none" if variant.guidance_scale is None else "internal",
        scale=variant.guidance_scale or 1.0,
    )
    tokens = torch.cat(
        [
            snapshot.normalizer.to_tokens(sampler.latents(numbers))
            for numbers in torch.arange(asked.samples).split(SAMPLED_AT_ONCE)
        ]
    )
    found = frechet_distance(reference, gaussian(tokens.numpy()))
    kept.write_text(json.dumps({"distance": found}))
    return found


def call(command: list[str], threads: int) -> None:
    """Run one of the project's own commands; what it says goes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=Path.cwd(), env=environment)


def write_report(
    asked: argparse.Namespace, store: Store, results: dict[str, dict[int, dict[int, float]]]
) -> None:
    """Write recipes.json, the table of the last measurements and the chart of all."""
    told = {
        "what": "Fréchet distance of generated to held-out tokens, by step, for equal FLOPs; lower is better",
        "steps_of_v1": asked.steps,
        "samples": asked.samples,
        "sampling_steps": asked.sampling_steps,
        "held_out": asked.held_out,
        "batch": BATCH,
        "distances": results,
    }
    (asked.out / "recipes.json").write_text(json.dumps(told, indent=2) + "\n")
    lines = ["| recipe | steps | distance, mean over seeds (lowest to highest) |", "|---|---|---|"]
    for name, by_seed in results.items():
        ends = [by_step[max(by_step)] for by_step in by_seed.values()]
        steps = max(max(by_step) for by_step in by_seed.values())
        spread = f"{np.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"
        lines.append(f"| {VARIANTS[name].label} | {steps} | {spread} |")
    (asked.out / "recipes.md").write_text("\n".join(lines) + "\n")
    (asked.out / "recipes.svg").write_text(chart(results, store, asked.steps))


def chart(results: dict[str, dict[int, dict[int, float]]], store: Store, steps: int) -> str:
    """Distance against training FLOPs, in steps of v1: a line a recipe, a dot a seed."""
    width, height, left, right, top, bottom = 760, 430, 70, 430, 16, 380
    colours = ("#666666", "#9a7d0a", "#1f5fbf", "#c0392b", "#2e8b57", "#8e44ad", "#e67e22")
    values = [value for seeds in results.values() for by_step in seeds.values() for value in by_step.values()]
    low, high = np.log(min(values)), np.log(max(values))
    span = max(high - low, 1e-9)

    def place(share: float, value: float) -> tuple[float, float]:
        return left + share * (right - left), bottom - (np.log(value) - low) / span * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>',
        f'<text x="{left}" y="{bottom + 34}">training FLOPs, in steps of RAE\'s recipe (0 to {steps})</text>',
        f'<text x="14" y="{bottom}" transform="rotate(-90 14 {bottom})">Fréchet distance of tokens (log)</text>',
    ]
    for value in np.exp(np.linspace(low, high, 5)):
        y = place(0, value)[1]
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for number, (name, by_seed) in enumerate(results.items()):
        colour = colours[number % len(colours)]
        end = equal_steps(store, VARIANTS[name], steps)
        shares = sorted({step for by_step in by_seed.values() for step in by_step})
        means = [float(np.mean([by_step[step] for by_step in by_seed.values()])) for step in shares]
        line = " ".join(
            "{:.1f},{:.1f}".format(*place(s / end, m)) for s, m in zip(shares, means, strict=True)
        )
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for by_step in by_seed.values():
            for step, value in by_step.items():
                x, y = place(step / end, value)
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}" fill-opacity="0.6"/>'
                )
        y = top + 14 + 20 * number
        parts.append(f'<rect x="{right + 24}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{right + 42}" y="{y}">{VARIANTS[name].label}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
