"""A device alone against encoding on it end to end, for what a store can hold and where it can be; each line at once.

    python benchmarks/encoding_table.py [--device cuda:0] [--batch-size 256] [--seconds 2] [--images 6000] ...

Images are decoded already, so that device, writers and disk are what is measured; the last line decodes JPEG files. The
goal is 0.9 of the compiled device on a RAM disk, and on a disk 0.9 of what the disk takes (`benchmarks/writing.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
from encoding import VIEWS, Case, encoder_alone, end_to_end, photographs, recipe_for
from measuring import benchmark_plan

from pipeline.encoders.encoder import create_encoder
from shards import Int8Code, usable_cores
from shards.values.quantize import fit_code


def code_for(width: int) -> Int8Code:
    """Return a code for tokens after a LayerNorm."""
    return fit_code(torch.randn((2048, width), generator=torch.Generator().manual_seed(0)).numpy())


def main() -> None:
    """Measure and print line after line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="vit_base_patch14_reg4_dinov2")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0, help="what the device alone takes for a round")
    parser.add_argument("--images", type=int, default=0, help="JPEG files of a last round that decodes them")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk")
    parser.add_argument("--ram", type=Path, default=Path("/dev/shm"), help="folder on a RAM disk")
    parser.add_argument("--ways", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--out", type=Path, default=Path("runs/encoding_table.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    encoder = create_encoder(options.encoder, "random:0").to_device(device, precision)
    crop, lines = 16 * encoder.identity.grid[0], []
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def tell(line: dict[str, object]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        options.out.write_text(json.dumps(lines, indent=1) + "\n")

    for way in options.ways:
        if way == "compiled":
            begun = time.perf_counter()
            encoder.compile_trunk()
        plan = benchmark_plan(options.batch_size, 1)
        recipe = recipe_for(encoder, plan, crop, ("center",))
        case = Case(encoder, plan, recipe, options.batch_size, usable_cores(), ready=True)
        encoder_alone(case)
        if way == "compiled":
            tell({"compiling": round(time.perf_counter() - begun, 1), "unit": "s"})
        begun, batches = time.perf_counter(), 0
        while time.perf_counter() - begun < options.seconds:
            encoder_alone(case)
            batches += 1
        alone = batches * options.batch_size / (time.perf_counter() - begun)
        tell({"encoder": options.encoder, "way": way, "device alone": round(alone), "unit": "images/s"})
        plan = benchmark_plan(max(4 * options.batch_size, int(alone * options.seconds)), 4)
        for views in (("center",), VIEWS):
            for dtype in ("float16", "int8"):
                for side in (crop, 0):
                    recipe = recipe_for(encoder, plan, side, views)
                    code = code_for(encoder.identity.width) if dtype == "int8" else None
                    recipe = dataclasses.replace(
                        recipe, dtype=dtype, code=None if code is None else code.digest
                    )
                    for where, place in (("RAM disk", options.ram), ("disk", options.data)):
                        case = Case(
                            encoder,
                            plan,
                            recipe,
                            options.batch_size,
                            usable_cores(),
                            ready=True,
                            place=place,
                            code=code,
                        )
                        rate = end_to_end(case) * len(views)
                        tell({"way": way, "views": len(views), "dtype": dtype, "images of": side, "where": where,
                              "end to end": round(rate), "of the device": round(rate / alone, 3)})  # fmt: skip
    if options.images:
        plan = photographs(options.data / "photographs", options.images, (500, 375))
        recipe = recipe_for(encoder, plan, crop)
        case = Case(encoder, plan, recipe, options.batch_size, usable_cores(), place=options.ram)
        tell({"with decoding": round(end_to_end(case) * 2), "cores": usable_cores(), "unit": "images/s"})


if __name__ == "__main__":
    main()
