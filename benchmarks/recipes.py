"""Train RAE's recipe, RAEv2's, and RAEv2's without each of its parts, for equal FLOPs on the demo's photographs.

    python benchmarks/recipes.py                       # 1500 steps of RAE's, three seeds: hours on two cores
    python benchmarks/recipes.py --steps 300 --points 3     # a shorter look
    python benchmarks/recipes.py --report              # what is measured so far, without training

Each run is an ordinary run of train/dit.py with a share of the images held out. At some of its steps samples are made
from the averaged weights, and the Fréchet distance of their tokens to the held-out images' is taken: in the store's own
feature space, without any decoder. Internal guidance costs no training, so it is a second reading of RAEv2's runs.

All runs go to the first measurement, then all to the second, and so on, so that what is there can be compared at any
time. Run the same command again to continue; several processes may take different `--seeds`. Writes recipes.json,
recipes.md and recipes.svg, of the measurements that all recipes and seeds have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eval.generate.sampler import LatentSampler
from eval.metrics.moments import FeatureMoments, Gaussian
from eval.metrics.results import versions, write_json
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

Distances = dict[str, dict[int, dict[int, float]]]
"""By variant, seed and number of the measurement, from 1."""


def main() -> int:
    """Run what is missing, measure, and write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipes"))
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of v1; others get its FLOPs")
    parser.add_argument("--points", type=int, default=5, help="measurements a run, evenly spread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of training and sampling"
    )
    parser.add_argument("--lr", type=float, default=5e-3, help="of every recipe, Muon's and AdamW's alike")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="train nothing")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    store = open_store(demo_store(asked.out))
    for point in range(1, asked.points + 1) if not asked.report else ():
        for seed in asked.seeds:
            for name in asked.variants:
                run = Run(asked, store, name, seed)
                if run.measured(point) is None:
                    run.train(point)
                    run.measure(point)
    write_report(asked, store)
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


class Run:
    """A variant with a seed: what it trains, and what was measured of it."""

    def __init__(self, asked: argparse.Namespace, store: Store, name: str, seed: int) -> None:
        """Name a run; nothing happens yet.

        Args:
            asked: the command's settings.
            store: what is trained on.
            name: of a variant.
            seed: of training and of sampling.
        """
        self.asked, self.store, self.seed, self.variant = asked, store, seed, VARIANTS[name]
        self.folder = asked.out / f"{self.variant.trained_as or name}-steps-{asked.steps}-seed-{seed}"
        self.every = max(1, equal_steps(store, self.variant, asked.steps) // asked.points)

    def train(self, point: int) -> None:
        """Go on to the step of a measurement."""
        end = self.every * self.asked.points
        settings = {
            "store": self.store.path,
            "out": self.folder,
            "max-steps": self.every * point,
            "global-batch-size": BATCH,
            "seed": self.seed,
            # Averages over an eighth of the whole run, whatever its length: 0.995 of the presets for 1500 steps.
            "ema-rates": f"{1 - 8 / max(9, end):.4f}",
            "held-out": self.asked.held_out,
            "precision": self.asked.precision,
            "optimizer.lr": self.asked.lr,
            "milestone-every": self.every,
            "checkpoint-every": self.every,
            "snapshot-every": end,
            "log-every": self.every,
            "tracker": "none",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        call(
            [sys.executable, "train/dit.py", self.variant.preset, *words, *self.variant.changes],
            self.asked.threads,
        )

    def measured(self, point: int) -> float | None:
        """Return the distance at a measurement, if it was taken."""
        kept = self._kept(point)
        return float(json.loads(kept.read_text())["distance"]) if kept.exists() else None

    def measure(self, point: int) -> None:
        """Take the distance of samples to the images that the run has never seen, and keep it beside the snapshot."""
        reference = held_out_tokens(self.store, self.asked.held_out, self.seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.asked.precision == "bf16"):
            tokens = sampled_tokens(self._snapshot(point), self.variant, self.asked, self.seed)
        write_json(self._kept(point), {"distance": frechet_distance(reference, gaussian(tokens))})

    def _snapshot(self, point: int) -> Path:
        return self.folder / f"snapshots/step-{self.every * point:08d}.safetensors"

    def _kept(self, point: int) -> Path:
        scale = self.variant.guidance_scale or 1
        return self._snapshot(point).with_suffix(
            f".{self.asked.samples}-{self.asked.sampling_steps}-{scale:g}.json"
        )


def equal_steps(store: Store, variant: Variant, steps: int) -> int:
    """Optimizer steps that cost what `steps` of v1 cost."""
    ours, theirs = (
        forward_flops(dit_config(dit_settings(preset).model, store))
        for preset in (VARIANTS["v1"].preset, variant.preset)
    )
    return round(steps * ours / theirs)


def held_out_tokens(store: Store, held_out: int, seed: int) -> Gaussian:
    """Return the normal distribution that represents the tokens of the images that a run has never seen."""
    _, rows = split_rows(store.valid_rows, held_out, seed=seed)
    reader = store.reader("center", "tokens")
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    return gaussian(out.astype(np.float32))


def gaussian(tokens: NDArray[np.float32]) -> Gaussian:
    """Of tokens float32 [n, N, D], all places of all images alike."""
    return FeatureMoments.of(tokens.reshape(-1, tokens.shape[-1])).gaussian()


def sampled_tokens(path: Path, variant: Variant, asked: argparse.Namespace, seed: int) -> NDArray[np.float32]:
    """Tokens float32 [samples, N, D] that a snapshot generates."""
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
    parts = [
        snapshot.normalizer.to_tokens(sampler.latents(numbers).float())
        for numbers in torch.arange(asked.samples).split(SAMPLED_AT_ONCE)
    ]
    tokens: NDArray[np.float32] = torch.cat(parts).numpy()
    return tokens


def call(command: list[str], threads: int) -> None:
    """Run one of the project's own commands; what it says goes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=Path.cwd(), env=environment)


def complete(asked: argparse.Namespace, store: Store) -> Distances:
    """Return the measurements that all recipes and seeds have, whoever took them."""
    found: Distances = {name: {seed: {} for seed in asked.seeds} for name in asked.variants}
    for point in range(1, asked.points + 1):
        distances = {
            (name, seed): Run(asked, store, name, seed).measured(point)
            for name in asked.variants
            for seed in asked.seeds
        }
        if None in distances.values():
            continue
        for (name, seed), distance in distances.items():
            assert distance is not None
            found[name][seed][point] = distance
    return found


def write_report(asked: argparse.Namespace, store: Store) -> None:
    """Write recipes.json, the table of the last measurements and the chart of all."""
    distances = complete(asked, store)
    points = sorted(distances[asked.variants[0]][asked.seeds[0]])
    if not points:
        return
    every = {name: Run(asked, store, name, 0).every for name in asked.variants}
    write_json(
        asked.out / "recipes.json",
        {
            "what": "Fréchet distance of generated to held-out tokens, by recipe, seed and step, at equal FLOPs of the "
            "networks; lower is better",
            "samples": asked.samples,
            "sampling_steps": asked.sampling_steps,
            "held_out": asked.held_out,
            "batch": BATCH,
            "precision": asked.precision,
            "learning_rate": asked.lr,
            "versions": versions(),
            "distances": {
                name: {
                    seed: {every[name] * point: value for point, value in by_point.items()}
                    for seed, by_point in by_seed.items()
                }
                for name, by_seed in distances.items()
            },
        },
    )
    lines = ["| recipe | steps | distance, mean over seeds (lowest to highest) |", "|---|---:|---|"]
    for name, by_seed in distances.items():
        ends = [by_point[points[-1]] for by_point in by_seed.values()]
        spread = f"{np.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"
        lines.append(f"| {VARIANTS[name].label} | {every[name] * points[-1]} | {spread} |")
    (asked.out / "recipes.md").write_text("\n".join(lines) + "\n")
    plot(distances, every["v1"] if "v1" in every else every[asked.variants[0]], asked.out / "recipes.svg")


def plot(distances: Distances, every: int, path: Path) -> None:
    """Distance against training FLOPs, in steps of RAE's: a line a recipe through its seeds' mean, a dot a seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "recipes"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for number, (name, by_seed) in enumerate(distances.items()):
        points = list(next(iter(by_seed.values())))
        steps = [every * point for point in points]
        values = np.array([list(by_point.values()) for by_point in by_seed.values()])
        axes.plot(steps, values.mean(axis=0), color=f"C{number}", label=VARIANTS[name].label)
        axes.scatter(np.tile(steps, len(values)), values.ravel(), s=12, color=f"C{number}", alpha=0.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(steps)
    axes.grid(visible=True, alpha=0.3)
    axes.set_title("Generated against held-out tokens, at equal training FLOPs")
    axes.set_xlabel("training FLOPs, in steps of RAE's recipe")
    axes.set_ylabel("Fréchet distance of tokens (log)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
