"""The named encoders: bytes a row, work an image, and whether combining blocks costs anything beside the network.

    python benchmarks/encoders.py [--device cuda:0] [--precision bfloat16] [--compile] [--recipes NAME ...]

Each encoder as `pipeline encode` calls it runs in turns with its bare network to the last block, on the same images.
Weights are random: they do not change what anything costs. On a CPU the clock is that of the process, which stands
still while other work has the cores: rates are images a minute of one core's time.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import Result, report
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.encoders.aggregation import Aggregation
from pipeline.encoders.encoder import create_encoder
from pipeline.encoders.frozen import Encoder
from pipeline.encoders.recipes import RECIPES

FLOAT16 = 2


def facts_of(encoder: Encoder) -> dict[str, float]:
    """Bytes of a row's tokens and class token in float16, parameters in millions and GFLOP an image (1 MAC = 2)."""
    identity = encoder.identity
    with FlopCounterMode(display=False) as counter:
        encoder.tokens_of(torch.zeros(1, 3, identity.input_size, identity.input_size, device=encoder.device))
    parameters = sum(parameter.numel() for parameter in encoder.trunk.parameters())
    return {
        "bytes": identity.num_tokens * identity.width * FLOAT16,
        "class token bytes": identity.width
        * FLOAT16
        * (getattr(encoder.trunk, "cls_token", None) is not None),
        "million parameters": round(parameters / 1e6, 1),
        "GFLOP": round(counter.get_total_flops() / 1e9, 1),
    }


def in_turns(
    functions: Sequence[Callable[[], object]], images: int, rounds: int, device: torch.device
) -> list[list[float]]:
    """Images a minute of each function, one entry a round; the first call of each is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    rates: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        order = range(len(functions)) if turn % 2 else reversed(range(len(functions)))
        for index in order:
            began = clock()
            functions[index]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                rates[index].append(60 * images / (clock() - began))
    return rates


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoders.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")

    results, table = [], {}
    networks = dict.fromkeys(RECIPES[name].model for name in options.recipes)
    for network in networks:
        names = [name for name in options.recipes if RECIPES[name].model == network]
        encoder = create_encoder(network, "random:0").to_device(device, precision)
        size = 16 * encoder.identity.grid[0]
        pixels = torch.rand(options.batch_size, 3, size, size, device=device)
        wanted = {name: _aggregation(encoder, name) for name in names}
        table |= dict.fromkeys(names, facts_of(encoder))
        functions = [_network_alone(encoder, pixels, compiled=options.compile)]
        functions += [_call(encoder, pixels, [aggregation]) for aggregation in wanted.values()]
        if len(names) > 1:
            functions.append(_call(encoder, pixels, list(wanted.values())))
            names.append(" and ".join(names) + " in one pass")
        if options.compile:
            encoder.compile_trunk()
        rates = in_turns(functions, options.batch_size, options.rounds, device)
        results += [
            Result(name, "the network alone", 0.95, own, rates[0], unit="images/min")
            for name, own in zip(names, rates[1:], strict=True)
        ]
        del encoder, functions
        gc.collect()
    facts = {
        "device": str(device),
        "precision": precision,
        "batch size": options.batch_size,
        "compiled": options.compile,
        "threads": torch.get_num_threads(),
        "recipes": table,
    }
    report(results, facts, options.out)


def _aggregation(encoder: Encoder, name: str) -> Aggregation:
    recipe = RECIPES[name]
    if recipe.layers is None:
        return encoder.aggregation
    return encoder.of_blocks(recipe.layers, recipe.combination, name).aggregation


def _call(encoder: Encoder, pixels: Tensor, aggregations: list[Aggregation]) -> Callable[[], object]:
    return lambda: encoder.encode_all(pixels, aggregations, class_token=False)


def _network_alone(encoder: Encoder, pixels: Tensor, *, compiled: bool) -> Callable[[], object]:
    """All blocks and the last norm on pixels that are prepared."""
    forward = encoder.trunk.forward_features
    if compiled:
        forward = torch.compile(forward)
    low = encoder.precision == "bfloat16"

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=low):
            return forward(prepared)

    prepared = encoder.prepare(pixels)
    return call


if __name__ == "__main__":
    main()
