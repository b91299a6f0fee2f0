"""Time a training step of DiT-DH (forward and backward) against a plain implementation of the same network.

    python benchmarks/step.py                      # on a CPU: a narrow DiT-DH, 256 tokens
    python benchmarks/step.py --size xl --batch 32 --precision bf16 --compile     # on a GPU

The plain implementation below is what one writes from the paper's text: separate small steps in eager PyTorch, one
module a line of the method. Both networks hold the same weights, are checked to agree, and run in turns in one
process, so that a busy machine slows both. Prints the ratio of medians and writes JSON.

`--network FILE.py:FUNCTION` adds a third network, to compare with somebody else's code: the function takes our
configuration and returns a module that is called like ours, (x_t, t, y) -> velocity. Its weights are its own; with
--compile it is compiled as one program.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import mean_flow_step
import torch
import torch.nn.functional as F
import with_encoder
from torch import Tensor, nn

from train.models.build import build_model
from train.models.config import DiTDHConfig, dit_dh_config
from train.models.cost import forward_flops, num_parameters
from train.models.dit_dh import DiTDH
from train.models.layers import Block


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm, step by step."""
    assert isinstance(norm.weight, Tensor)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding by a rotated copy, x [B, H, N, head_width]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def plain_block(block: Block, x: Tensor, c: Tensor, rope: nn.Module, *, fused_attention: bool) -> Tensor:
    """One block as the paper writes it down."""
    c = c.expand(-1, x.shape[1], -1) if c.shape[1] == x.shape[1] else c
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=-1)
    attention = block.attn
    y = plain_norm(block.norm1, x) * (1 + scale_1) + shift_1
    qkv = attention.qkv(y).reshape(*y.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = (plain_rotation(part, rope.freqs_cos, rope.freqs_sin).to(v.dtype) for part in (q, k))
    if fused_attention:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    x = x + gate_1 * attention.proj(y.transpose(1, 2).flatten(2))
    y = plain_norm(block.norm2, x) * (1 + scale_2) + shift_2
    gate, value = block.mlp.w12(y).chunk(2, dim=-1)
    return x + gate_2 * block.mlp.w3(F.silu(gate) * value)


class PlainDiTDH(nn.Module):
    """DiT-DH over the same weights, written plainly."""

    def __init__(self, model: DiTDH, *, fused_attention: bool) -> None:
        super().__init__()
        self.model = model
        self.fused_attention = fused_attention

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity, as `DiTDH.forward`."""
        m, depth = self.model, self.model.config.depth
        time = m.t_embedder(t)
        c = F.silu(time + m.y_embedder(y))[:, None]
        s = m.s_embedder(x_t) + m.pos_embed
        for block in m.blocks[:depth]:
            s = plain_block(block, s, c, m.enc_feat_rope, fused_attention=self.fused_attention)
        s = m.s_projector(F.silu(time[:, None].repeat(1, s.shape[1], 1) + s))
        x = m.x_embedder(x_t)
        for block in m.blocks[depth:]:
            x = plain_block(block, x, s, m.dec_feat_rope, fused_attention=self.fused_attention)
        shift, scale = m.final_layer.adaLN_modulation(s).chunk(2, dim=-1)
        x = m.final_layer.linear(plain_norm(m.final_layer.norm_final, x) * (1 + scale) + shift)
        rows, columns = m.config.token_grid
        return x.reshape(len(x), rows, columns, -1).permute(0, 3, 1, 2)


def benchmark_config(size: str) -> DiTDHConfig:
    """Return a published size, "narrow": XL's proportions at a size a CPU runs, or "tiny": the demo's."""
    if size == "tiny":
        base = dit_dh_config("s", token_width=64, grid=(6, 6), num_classes=16)
        return replace(base, width=128, depth=6, num_heads=4, head_width=256, head_depth=2, head_num_heads=4)
    if size == "narrow":
        base = dit_dh_config("s", token_width=192, grid=(16, 16), num_classes=10)
        return replace(base, width=288, depth=7, num_heads=4, head_width=512, head_depth=2, head_num_heads=4)
    return dit_dh_config(size, token_width=768, grid=(16, 16), num_classes=1000)


def trained_like(model: nn.Module) -> nn.Module:
    """Give the zero-initialised layers values, so that no product is skipped or denormal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def third_network(place: str, config: DiTDHConfig) -> nn.Module:
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
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.json"))
    arguments = parser.parse_args()
    if arguments.with_encoder:
        with_encoder.main(arguments)
        return
    if arguments.mean_flow:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        mean_flow_step.main(arguments, benchmark_config(arguments.size), trained_like)
        return

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = arguments.precision == "tf32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = benchmark_config(arguments.size)
    ours = trained_like(build_model(config)).to(device)
    networks: dict[str, nn.Module] = {
        "ours": ours,
        "plain, fused attention": PlainDiTDH(copy.deepcopy(ours), fused_attention=True),
        "plain, eager attention": PlainDiTDH(copy.deepcopy(ours), fused_attention=False),
    }
    x = torch.randn(arguments.batch, config.token_width, *config.grid, device=device)
    t = torch.rand(arguments.batch, device=device)
    y = torch.randint(config.num_classes, (arguments.batch,), device=device)
    with torch.no_grad():
        outputs = [network(x, t, y) for network in networks.values()]
    disagreement = max(((out - outputs[0]).norm() / outputs[0].norm()).item() for out in outputs[1:])
    assert disagreement < 1e-3, f"the networks disagree by {disagreement}"
    if arguments.network:
        networks["third"] = third_network(arguments.network, config).to(device)
    if arguments.compile:
        ours.compile()
        if "third" in networks:
            networks["third"].compile()

    def step(network: nn.Module) -> float:
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = network(x, t, y).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

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
        f"DiT-DH {arguments.size}, {num_parameters(config) / 1e6:.1f} M parameters, batch {arguments.batch}, "
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
