"""The whole program that makes samples against what its networks alone could do.

    python benchmarks/sampling.py --only rates,images                                    # on a CPU: narrow networks
    python benchmarks/sampling.py --size xl --batch 64 --precisions fp32,tf32,bf16         # on a GPU

`rates`: images a second of `eval.generate.producer` with a file to write to, in 49 evaluations, over what the network's
forward passes alone allow, for each precision, eager and compiled; hours for 50,000 samples on one device.
`guidance`: AutoGuidance, over the same networks called as the reference calls them: model and guide on a batch doubled
with labels of no class, whose half is dropped at the end; then the decoder, then the copy (src/sample_ddp.py in
github:bytetriper/RAE at a4d18c4). `steps`: one jump against fifty steps, and the share of the time that decoding takes.
`images`: how far the images of each precision lie from those of eager float32.

Both sides of a ratio run in turns in one process. Weights are random unless `--snapshot` and `--decoder` name some;
they change no speed, but they change how far images differ. Writes JSON and prints tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling_program import POINTS, SCALE, Networks, Program, Way, loaded_networks, random_networks

from eval.metrics.results import device_name, versions
from train.models.cost import forward_flops

WANTED = 50_000
"""Samples of the published evaluation."""


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[float, float, list[float]]:
    """Measure two rates in turns; returns the median of each and the ratio ours / theirs of every round."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    mine, other = (statistics.median(values) for values in zip(*pairs, strict=True))
    return mine, other, [a / b for a, b in pairs]


def measured_rates(networks: Networks, way: Way, device: torch.device, options: Any) -> dict[str, Any]:
    """Measure one line of the table of precisions."""
    program = Program(networks, way, device, options.batch)
    begun = time.perf_counter()
    program.rate(program.producer(points=2), 1)
    warming = time.perf_counter() - begun
    producer = program.producer()
    ours, alone, ratios = in_turns(
        lambda: program.rate(producer, options.batches),
        lambda: program.forward_rate(min(POINTS - 1, options.calls)),
        options.rounds,
    )
    flops = (POINTS - 1) * forward_flops(program.config) + forward_flops(program.decoder.config)
    return {
        "way": str(way),
        "images_per_second": ours,
        "forward_images_per_second": alone,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "hours": WANTED / ours / 3600,
        "tflops_per_second": ours * flops * 1e-12,
        "first_batch_of_one_step_seconds": warming,
    }


def measured_guidance(networks: Networks, way: Way, device: torch.device, options: Any) -> dict[str, Any]:
    """Measure AutoGuidance against the reference's way, with the same networks."""
    program = Program(networks, way, device, options.batch)
    guided = {"guidance": "autoguidance", "scale": SCALE, "guide": program.guide}
    for measured in (program.rate, program.reference_rate):
        measured(program.producer(points=2, **guided), 1)
    producer = program.producer(points=options.points, **guided)
    ours, theirs, ratios = in_turns(
        lambda: program.rate(producer, options.batches),
        lambda: program.reference_rate(producer, options.batches),
        options.rounds,
    )
    return {
        "way": str(way),
        "points": options.points,
        "images_per_second": ours,
        "reference_images_per_second": theirs,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def measured_steps(networks: Networks, way: Way, device: torch.device, options: Any) -> dict[str, Any]:
    """Measure one jump against fifty Euler steps, and the decoder alone beside both."""
    program = Program(networks, way, device, options.batch)
    ways = {
        "jump-1": program.producer(points=2, kind="uniform", method="jump"),
        "euler-50-to-zero": program.producer(points=51, kind="to-zero"),
    }
    jumping, stepping = ways.values()
    program.rate(jumping, 1)
    program.decoding_rate(1)
    program.forward_rate(1)
    many = max(options.batches, 32)  # the last batch is written while nothing else is done
    ours, theirs, ratios = in_turns(
        lambda: program.rate(jumping, many), lambda: program.rate(stepping, options.batches), options.rounds
    )
    decoding = statistics.median(program.decoding_rate(8) for _ in range(options.rounds))
    evaluating = statistics.median(program.forward_rate(8, 1) for _ in range(options.rounds))
    decoded, evaluated = forward_flops(program.decoder.config), forward_flops(program.config)
    return {
        "way": str(way),
        "images_per_second": {"jump-1": ours, "euler-50-to-zero": theirs},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "networks_alone_images_per_second": {
            name: 1 / (count / evaluating + 1 / decoding)
            for name, count in (("jump-1", 1), ("euler-50-to-zero", 50))
        },
        "decoder_alone_images_per_second": decoding,
        "decoder_share_of_seconds": {"jump-1": ours / decoding, "euler-50-to-zero": theirs / decoding},
        "decoder_share_of_flops": {
            "jump-1": decoded / (decoded + evaluated),
            "euler-50-to-zero": decoded / (decoded + 50 * evaluated),
        },
    }


def images_of(program: Program, count: int) -> np.ndarray:
    """Make the first samples, uint8 [n, H, W, 3]."""
    found: list[np.ndarray] = []
    program.producer().produce(np.arange(count), lambda _numbers, images: found.append(images.copy()))
    return np.concatenate(found)


def difference(images: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """Say how far images uint8 [n, H, W, 3] are from others: levels of 255, and PSNR in dB of all pixels together."""
    distance = np.abs(images.astype(np.int16) - exact.astype(np.int16))
    rms = float(np.sqrt(np.mean(np.square(distance, dtype=np.float64))))
    return {
        "largest_levels": int(distance.max()),
        "rms_levels": rms,
        "psnr": None if rms == 0 else 20 * float(np.log10(255 / rms)),
        "share_of_values_that_differ": float((distance > 0).mean()),
        "share_of_values_more_than_one_level_apart": float((distance > 1).mean()),
    }


def measured_images(
    networks: Networks, ways: list[Way], device: torch.device, options: Any
) -> list[dict[str, Any]]:
    """Compare every way's images with those of eager float32, and eager ones with their own in smaller batches."""
    exact: np.ndarray | None = None
    rows = []
    reference = Way("fp32", compiled=False)
    for way in [reference, *(way for way in ways if way != reference)]:
        images = images_of(Program(networks, way, device, options.batch), options.images)
        if exact is None:
            exact = images
        else:
            rows.append({"way": str(way), **difference(images, exact)})
        if not way.compiled:
            halved = images_of(Program(networks, way, device, max(1, options.batch // 2)), options.images)
            rows.append({"way": f"{way}, against half the batch", **difference(halved, images)})
        release(device)
    rows[0]["std_of_reference_levels"] = float(exact.std())
    return rows


def release(device: torch.device) -> None:
    """Give back what the last way's networks took."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Networks, Way, torch.device, Any], dict[str, Any]]] = {
    "rates": measured_rates,
    "guidance": measured_guidance,
    "steps": measured_steps,
}


def table(section: str, rows: list[dict[str, Any]]) -> str:
    """Show the rows as a Markdown table."""
    heads = {
        "rates": ("images/s", "forward passes alone", "ratio", "hours for 50,000", "TFLOP/s"),
        "guidance": ("images/s", "as the reference", "ratio"),
        "steps": (
            "one step, images/s",
            "of both networks alone",
            "fifty",
            "ratio",
            "decoder's share of seconds",
        ),
        "images": ("largest, levels", "rms, levels", "PSNR", "more than one level apart"),
    }[section]
    lines = [f"| way | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row in rows:
        if section == "rates":
            values = [
                f"{row['images_per_second']:.3g}", f"{row['forward_images_per_second']:.3g}",
                f"{row['ratio']:.3f}", f"{row['hours']:.2f}", f"{row['tflops_per_second']:.3g}",
            ]  # fmt: skip
        elif section == "guidance":
            values = [
                f"{row['images_per_second']:.3g}", f"{row['reference_images_per_second']:.3g}", f"{row['ratio']:.2f}",
            ]  # fmt: skip
        elif section == "steps":
            rates, shares = row["images_per_second"], row["decoder_share_of_seconds"]
            alone = rates["jump-1"] / row["networks_alone_images_per_second"]["jump-1"]
            values = [f"{rates['jump-1']:.3g}", f"{alone:.2f}", f"{rates['euler-50-to-zero']:.3g}"]
            values += [
                f"{row['ratio']:.1f}",
                " and ".join(f"{100 * share:.1f} %" for share in shares.values()),
            ]
        else:
            values = [
                f"{row['largest_levels']}", f"{row['rms_levels']:.3f}",
                "same bits" if row["psnr"] is None else f"{row['psnr']:.1f}",
                f"{100 * row['share_of_values_more_than_one_level_apart']:.2f} %",
            ]  # fmt: skip
        lines.append(f"| {row['way']} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="rates,guidance,steps,images")
    parser.add_argument("--size", default="narrow", choices=["narrow", "s", "b", "l", "xl"])
    parser.add_argument("--snapshot", type=Path, help="a DiT in place of one with random weights")
    parser.add_argument("--decoder", type=Path, help="its decoder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3, help="batches of the program in a round")
    parser.add_argument("--calls", type=int, default=49, help="forward passes in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=POINTS, help="of guidance")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--compile", default="off,on", help="off, on, or both")
    parser.add_argument("--images", type=int, default=16, help="images that are compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sampling.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.snapshot is None:
        networks = random_networks(options.size, device)
    else:
        networks = loaded_networks(options.snapshot, options.decoder, device)
    ways = [
        Way(precision, compiled == "on")
        for precision in options.precisions.split(",")
        for compiled in options.compile.split(",")
    ]
    found: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "device": device_name(device),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for section in options.only.split(","):
        rows = []
        if section == "images":
            rows = measured_images(networks, ways, device, options)
        else:
            for way in ways:
                rows.append(SECTIONS[section](networks, way, device, options))
                print(table(section, rows).splitlines()[-1], flush=True)
                release(device)
        found[section] = rows
        print(f"\n{table(section, rows)}\n", flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
