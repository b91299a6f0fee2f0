"""First and later steps of a compiled network: by block, as the trainers compile, against the network as one program.

    python benchmarks/compiling.py                                                # on a CPU: XL's depth, narrow
    python benchmarks/compiling.py --size xl --batch 64 --precision bf16          # on a GPU

Each way runs in a process of its own with an empty compiler cache, then again with the cache it left. Prints seconds
to the end of the first step (forward and backward), median seconds of later ones, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

WAYS = ("block", "whole")


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first step and of later ones, in this process."""
    import torch
    from torch import nn

    from train.models.build import build_model
    from train.models.config import dit_dh_config

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.size == "narrow":
        config = dit_dh_config("xl", token_width=64, grid=(8, 8), num_classes=10)
        config = replace(config, width=64, num_heads=4, head_width=128, head_num_heads=4)
    else:
        config = dit_dh_config(arguments.size, token_width=768, grid=(16, 16), num_classes=1000)
    model = build_model(config).to(device)
    x = torch.randn(arguments.batch, config.token_width, *config.grid, device=device)
    t = torch.rand(arguments.batch, device=device)
    y = torch.zeros(arguments.batch, dtype=torch.long, device=device)

    def step() -> float:
        begun = time.perf_counter()
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = model(x, t, y).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    if arguments.way == "block":
        model.compile()
    else:
        nn.Module.compile(model)
    first = step()
    later = [step() for _ in range(arguments.steps)]
    return {"first": first, "later": statistics.median(later)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="narrow", choices=["narrow", "s", "b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process and print JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/compiling.json"))
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments)))
        return
    results: dict[str, dict[str, Any]] = {}
    for way in arguments.ways.split(","):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--way", way],
                    env={
                        **os.environ,
                        "TORCHINDUCTOR_CACHE_DIR": cache,
                        "TRITON_CACHE_DIR": f"{cache}/triton",
                    },
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                )
                results[f"{way}, {state} cache"] = json.loads(done.stdout.splitlines()[-1])
                seconds = results[f"{way}, {state} cache"]
                print(
                    f"{way:6} {state} cache: first {seconds['first']:7.1f} s, later {seconds['later']:.4f} s",
                    flush=True,
                )
    if len(results) == 2 * len(WAYS):
        ratio = results["block, cold cache"]["first"] / results["whole, cold cache"]["first"]
        print(f"the first step by block takes {ratio:.2f} of the time as one program (cold cache)")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {**vars(arguments), "out": str(arguments.out)}
    arguments.out.write_text(json.dumps({"settings": settings, "seconds": results}, indent=2))


if __name__ == "__main__":
    main()
