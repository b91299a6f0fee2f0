"""Time a training step (forward and backward) of either generation's network against a plain implementation of it.

    python benchmarks/step.py                      # on a CPU: a narrow DiT-DH, 256 tokens
    python benchmarks/step.py --generation raev2   # RAEv2's, as narrow
    python benchmarks/step.py --size xl --batch 32 --precision bf16 --compile     # on a GPU

The plain implementation (plain_networks.py) is what one writes from the paper's text: separate small steps in eager
PyTorch. Both networks hold the same weights, are checked to agree, and run in turns in one process; on a
CPU the seconds are those of its own threads (--threads 1 leaves none waiting). Prints the ratio of medians and writes
JSON.

`--network FILE.py:FUNCTION` adds a third network, to compare with somebody else's code: the function takes our
configuration and returns a module that is called like ours, (x_t, t, y) -> its outputs. Its weights are its own; with
--compile it is compiled as one program.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import mean_flow_step
import torch
import with_encoder
from plain_networks import plain_network
from torch import Tensor, nn

from train.models.build import build_model
from train.models.config import DiTDHConfig, InContextDiTConfig, dit_dh_config, raev2_config
from train.models.cost import forward_flops, num_parameters


def benchmark_config(size: str, generation: str = "rae") -> DiTDHConfig | InContextDiTConfig:
    """Return a published size, "narrow": XL's proportions at a size a CPU runs, or "tiny": the demo's."""
    build, width = (dit_dh_config, 768) if generation == "rae" else (raev2_config, 1024)
    if size == "tiny":
        base = build("s", token_width=64, grid=(6, 6), num_classes=16)
        return replace(base, width=128, depth=6, num_heads=4, head_width=256, head_depth=2, head_num_heads=4)
    if size == "narrow":
        base = build("s", token_width=192, grid=(16, 16), num_classes=10)
        return replace(base, width=288, depth=7, num_heads=4, head_width=512, head_depth=2, head_num_heads=4)
    return build(size, token_width=width, grid=(16, 16), num_classes=1000)


def outputs(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All that a network puts out."""
    return found if isinstance(found, tuple) else (found,)


def random_inputs(
    config: DiTDHConfig | InContextDiTConfig, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents [B, D, h, w], times [B] and classes [B] for a network."""
    return (
        torch.randn(batch, config.token_width, *config.grid, device=device),
        torch.rand(batch, device=device),
        torch.randint(config.num_classes, (batch,), device=device),
    )


def forward_backward(network: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: str) -> None:
    """Add the gradients of the mean squares of all outputs, in bfloat16 autocast where the precision is bf16."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = torch.stack([out.float().square().mean() for out in outputs(network(*inputs))]).sum()
    loss.backward()


def trained_like(model: nn.Module) -> nn.Module:
    """Give the zero-initialised layers values, so that no product is skipped or denormal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def third_network(place: str, config: DiTDHConfig | InContextDiTConfig) -> nn.Module:
    """Return the network that a function in a file makes: FILE.py:FUNCTION."""
    path, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("third_network", path)
    assert spec is not None, f"--network takes FILE.py:FUNCTION, got {place}"
    assert spec.loader is not None, f"--network takes FILE.py:FUNCTION, got {place}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = getattr(module, name)(config)
    return network


def main() -> None:  # noqa: C901 - an option a way of comparing
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", default="rae", choices=["rae", "raev2"])
    parser.add_argument("--size", default="narrow", choices=["tiny", "narrow", "s", "b", "l", "xl"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile ours by block and the third; the plain ones stay eager",
    )
    parser.add_argument("--network", help="a third network, FILE.py:FUNCTION")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--with-encoder", action="store_true", help="compare with the encoder in the loop instead"
    )
    parser.add_argument(
        "--latents",
        default="tokens",
        choices=["tokens", "flat"],
        help="with the encoder: DiT-DH on tokens, or plain DiT on 32 flat latents, whose compressor is in the loop too",
    )
    parser.add_argument(
        "--mean-flow",
        action="store_true",
        help="compare steps of few-step generation with flow matching instead",
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="with the encoder: no more a size")
    parser.add_argument("--sizes", default="s,b,l,xl", help="with the encoder")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.json"))
    arguments = parser.parse_args()
    if arguments.with_encoder:
        with_encoder.main(arguments)
        return
    if arguments.mean_flow:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        config = benchmark_config(arguments.size)
        assert isinstance(config, DiTDHConfig)
        mean_flow_step.main(arguments, config, trained_like)
        return

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = arguments.precision == "tf32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = benchmark_config(arguments.size, arguments.generation)
    ours = trained_like(build_model(config)).to(device)
    networks: dict[str, nn.Module] = {
        "ours": ours,
        "plain, fused attention": plain_network(ours, fused_attention=True),
        "plain, eager attention": plain_network(ours, fused_attention=False),
    }
    inputs = random_inputs(config, arguments.batch, device)
    with torch.no_grad():
        found = [torch.cat(outputs(network(*inputs))) for network in networks.values()]
    disagreement = max(((out - found[0]).norm() / found[0].norm()).item() for out in found[1:])
    assert disagreement < 1e-3, f"the networks disagree by {disagreement}"
    if arguments.network:
        networks["third"] = third_network(arguments.network, config).to(device)
    if arguments.compile:
        ours.compile()
        if "third" in networks:
            networks["third"].compile()

    # On a CPU seconds of this process's threads, so that other programs do not count.
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step(network: nn.Module) -> float:
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        forward_backward(network, inputs, arguments.precision)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for index in range(arguments.steps + 3):
        for name, network in networks.items():
            elapsed = step(network)
            if index >= 3:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # The ratio within each turn, because a busy machine slows a turn's networks alike.
    ratios = {
        name: statistics.median(b / a for a, b in zip(seconds["ours"], values, strict=True))
        for name, values in seconds.items()
    }

    flops = 3 * forward_flops(config) * arguments.batch
    print(
        f"{config.kind} {arguments.size}, {num_parameters(config) / 1e6:.1f} M parameters, batch {arguments.batch}, "
        f"{arguments.precision}, {device}, {arguments.threads} threads; outputs agree to {disagreement:.1e}"
    )
    for name, median in medians.items():
        print(
            f"{name:24} {1e3 * median:9.1f} ms   {flops / median / 1e9:9.1f} GFLOP/s   "
            f"ours is {ratios[name]:.2f}× as fast"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    values = {**vars(arguments), "out": str(arguments.out), "device": str(device), "torch": torch.__version__}
    arguments.out.write_text(
        json.dumps({"settings": values, "median_seconds": medians, "ratio": ratios}, indent=2)
    )


if __name__ == "__main__":
    main()
