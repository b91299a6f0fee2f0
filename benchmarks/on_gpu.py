"""Everything that wants a GPU, in at most eight minutes: figures first, tests last.

    python benchmarks/on_gpu.py [--wheels FOLDER] [--minutes 8] [--only NAME,NAME] [--out runs/on_gpu]

Parts run one after another, the most important first, each in a process of its own with a limit of its own. What a part
prints goes to the terminal and to OUT/NAME.log at once, so that a machine that is taken away leaves what was measured.
A bare machine needs PyTorch and, without a network, a folder of wheels to install the rest from (`pip download -d DIR
-c constraints.txt '.[test]'` on another machine).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: Its name; its log is named so.
        command: Arguments of python, run in the repository's root.
        seconds: When it is stopped, whatever it has printed by then.
    """

    name: str
    command: tuple[str, ...]
    seconds: int


TEST_FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tests").rglob("test_*.py")
    if "mark.gpu" in path.read_text(encoding="utf-8")
)
"""Files with tests of a GPU; others may need packages that a bare machine lacks."""

PARTS = (
    Part("peak", ("benchmarks/on_gpu.py", "--peak"), 30),
    Part(
        "step-profile",
        ("benchmarks/step_profile.py", "--size", "xl", "--batch", "64", "--ways", "plain,cudnn,flash",
         "--out", "runs/on_gpu/step_profile.json"),
        110,
    ),
    Part(
        "step-autotuned",
        ("benchmarks/step_profile.py", "--size", "xl", "--batch", "64", "--ways", "pointwise,autotune",
         "--out", "runs/on_gpu/step_autotuned.json"),
        150,
    ),
    Part(
        "raev2-step-profile",
        ("benchmarks/step_profile.py", "--generation", "raev2", "--size", "xl", "--batch", "48",
         "--out", "runs/on_gpu/step_profile_raev2.json"),
        70,
    ),
    Part(
        "step-xl",
        ("benchmarks/compiling.py", "--size", "xl", "--batch", "64", "--precision", "bf16", "--ways", "block"),
        100,
    ),
    Part(
        "step-parts",
        ("benchmarks/step_parts.py", "--size", "xl", "--batch", "64", "--out", "runs/on_gpu/step_parts.json"),
        80,
    ),
    Part(
        "encode",
        ("benchmarks/encoding.py", "--device", "cuda:0", "--precision", "bfloat16", "--compile",
         "--encoder", "vit_base_patch14_reg4_dinov2", "--stand-in", "--fast"),
        120,
    ),
    Part(
        "encode-table",
        ("benchmarks/encoding_table.py", "--device", "cuda:0", "--precision", "bfloat16", "--images", "3000",
         "--seconds", "1", "--out", "runs/on_gpu/encoding_table.json"),
        150,
    ),
    Part(
        "step-against-plain",
        ("benchmarks/step.py", "--size", "xl", "--batch", "32", "--precision", "bf16", "--compile", "--steps", "5"),
        90,
    ),
    Part(
        "raev2-step-against-plain",
        ("benchmarks/step.py", "--generation", "raev2", "--size", "xl", "--batch", "24", "--precision", "bf16",
         "--compile", "--steps", "5", "--out", "runs/on_gpu/step_raev2.json"),
        100,
    ),
    Part(
        "muon-step",
        ("benchmarks/optimizer_step.py", "--size", "xl", "--batch", "24", "--precision", "bf16", "--steps", "5",
         "--out", "runs/on_gpu/optimizer_step.json"),
        70,
    ),
    Part("cost", ("benchmarks/cost.py", "--sizes", "xl", "--stages", "sample,decode", "--batch-size", "64"), 90),
    Part(
        "sampling",
        ("benchmarks/sampling.py", "--only", "rates", "--size", "xl", "--batch", "64", "--precisions", "bf16,tf32",
         "--batches", "3", "--rounds", "1", "--out", "runs/on_gpu/sampling.json"),
        170,
    ),
    Part(
        "sampling-guidance",
        ("benchmarks/sampling.py", "--only", "guidance", "--size", "xl", "--batch", "64", "--precisions", "bf16",
         "--compile", "on", "--batches", "2", "--rounds", "1", "--out", "runs/on_gpu/sampling_guidance.json"),
        120,
    ),
    Part(
        "sampling-one-step",
        ("benchmarks/sampling.py", "--only", "steps", "--size", "xl", "--batch", "64", "--precisions", "bf16",
         "--batches", "1", "--out", "runs/on_gpu/sampling_one_step.json"),
        100,
    ),
    Part(
        "sampling-fp32",
        ("benchmarks/sampling.py", "--only", "rates", "--size", "xl", "--batch", "32", "--precisions", "fp32",
         "--batches", "1", "--rounds", "1", "--calls", "10", "--out", "runs/on_gpu/sampling_fp32.json"),
        100,
    ),
    Part(
        "sampling-images",
        ("benchmarks/sampling.py", "--only", "images", "--size", "xl", "--batch", "16",
         "--precisions", "fp32,tf32,bf16", "--out", "runs/on_gpu/sampling_images.json"),
        150,
    ),
    Part(
        "mean-flow",
        ("benchmarks/step.py", "--mean-flow", "--size", "xl", "--batch", "32", "--precision", "bf16", "--steps", "4"),
        80,
    ),
    Part("memory", ("benchmarks/memory.py", "--measure", "--out", "runs/on_gpu/memory.json"), 90),
    Part("feed", ("benchmarks/feed.py",), 60),
    Part(
        "encoders",
        ("benchmarks/encoders.py", "--device", "cuda:0", "--precision", "bfloat16", "--batch-size", "64",
         "--recipes", "raev2-dinov3-l-k1", "raev2-dinov3-l-k7", "raev2-dinov3-l-k23"),
        60,
    ),
    Part(
        "derive",
        ("benchmarks/deriving.py", "--batch-size", "256", "--stand-in", "--cold", "512", "--rounds", "2",
         "--out", "runs/on_gpu/deriving.json"),
        90,
    ),
    Part(
        "step-flat-latents",
        ("benchmarks/step.py", "--with-encoder", "--latents", "flat", "--batch", "512", "--precision", "bf16",
         "--compile", "--seconds", "6", "--steps", "3", "--sizes", "s,xl,b,l",
         "--out", "runs/on_gpu/step_flat_latents.json"),
        110,
    ),
    Part(
        "tests",
        ("-m", "pytest", "-m", "gpu", "-q", "-n", "8", "-p", "no:benchmark", "--dist", "worksteal", *TEST_FILES),
        180,
    ),
)  # fmt: skip
"""In order of importance."""


def run(part: Part, limit: float, folder: Path) -> str:
    """Run a part for at most so many seconds; returns how it ended."""
    begun = time.monotonic()
    added = [path] if (path := os.environ.get("PYTHONPATH")) else []
    with (folder / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", *part.command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *added])},
        )
        timer = threading.Timer(limit, lambda: os.killpg(process.pid, 9))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(f"[{part.name}] {line}", end="", flush=True)
            log.write(line)
            log.flush()
        code = process.wait()
        timer.cancel()
    seconds = time.monotonic() - begun
    return f"{part.name}: {'stopped at its limit' if code == -9 else f'exit {code}'} after {seconds:.0f} s"


def matrix_peak() -> None:
    """Print what this GPU multiplies: a bfloat16 product of 8192³, the best of twenty."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        torch.matmul(a, b)
        ended.record()
        torch.cuda.synchronize()
        best = min(best, begun.elapsed_time(ended) / 1e3)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {2 * 8192**3 / best / 1e12:.0f} TFLOP/s"
    )


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="install what is missing from this folder first")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--only", default=",".join(part.name for part in PARTS), help="parts, in the order in which they run"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--peak", action="store_true", help="print this GPU's matrix peak and end")
    arguments = parser.parse_args()
    if arguments.peak:
        matrix_peak()
        return
    end = time.monotonic() + 60 * arguments.minutes
    if arguments.wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links"]
        subprocess.run([*pip, str(arguments.wheels), "-e", f"{ROOT}[test]"], check=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    endings = []
    parts = {part.name: part for part in PARTS}
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"--only takes parts of {', '.join(parts)}; got {', '.join(unknown)}")
    for part in [parts[name] for name in names]:
        left = end - time.monotonic()
        if left < 10:
            endings.append(f"{part.name}: no time left")
            continue
        endings.append(run(part, min(part.seconds, left), arguments.out))
        print(endings[-1], flush=True)
    (arguments.out / "summary.txt").write_text("\n".join(endings) + "\n")
    print("\n".join(["", *endings]))


if __name__ == "__main__":
    main()
