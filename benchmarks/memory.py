"""How large a micro-batch fits: training memory of every DiT-DH by arithmetic, and measured where there is a GPU.

    python benchmarks/memory.py                # computed; any machine, a minute
    python benchmarks/memory.py --measure      # also runs steps on this machine's GPU and compares peaks

Weights, gradients, two moments and one average are float32, five times the parameters; autocast keeps a bfloat16 copy
of the matrices during a step. What the backward pass keeps of each sample is counted without computing anything:
shapes go through the real network (fake tensors, bfloat16 autocast, fused attention), and every distinct tensor that
autograd saves counts once. The compiler keeps less than that, so the batches are what fits at least. 5 % of a card
and 1 GB for CUDA itself are left free. Writes benchmarks/results/memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from train.models.build import build_model
from train.models.config import DiTDHConfig, dit_dh_config
from train.models.cost import num_parameters

GB = 1e9
CARDS = (24, 40, 80)
SIZES = ("s", "b", "l", "xl")
GRIDS = {256: (16, 16), 512: (32, 32)}
COPIES = 5
"""Float32 tensors of the parameters' size: weights, gradients, AdamW's two moments, one average."""
FREE, CUDA_BYTES = 0.05, 1e9


@dataclass(frozen=True)
class Need:
    """Bytes of a training step.

    Attributes:
        fixed: Whatever the batch.
        per_sample: More for each sample of a micro-batch.
    """

    fixed: float
    per_sample: float

    def fits(self, card: float) -> int:
        """Largest micro-batch on a card of so many GB; 0 where not even one sample fits."""
        return max(0, int((card * GB * (1 - FREE) - CUDA_BYTES - self.fixed) // self.per_sample))


def need(config: DiTDHConfig, *, checkpointing: bool) -> Need:
    """Count the memory that a step of a network needs, from shapes alone."""
    one, two = (kept_bytes(config, batch, checkpointing=checkpointing) for batch in (1, 2))
    parameters = num_parameters(config)
    matrices = 2 * parameters  # the copies that autocast makes
    return Need(COPIES * 4 * parameters + matrices, two - one)


def kept_bytes(config: DiTDHConfig, batch: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of a micro-batch, weights and their copies apart.

    With checkpointing, what recomputing one block needs comes on top: the head's, the widest.
    """
    with FakeTensorMode(), torch.device("cpu"):
        model = build_model(config)
        model.recompute_activations = checkpointing
        kept = _saved(model, config, batch)
        if checkpointing:
            model.recompute_activations = False
            model.blocks = model.blocks[-1:]
            model.config = replace(config, depth=0)
            kept += _saved(model, model.config, batch)
    return kept


def _saved(model: torch.nn.Module, config: DiTDHConfig, batch: int) -> int:
    storages: dict[int, Any] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    weights = {(tuple(p.shape), d) for p in model.parameters() for d in (torch.bfloat16, torch.float32)}
    weights |= {(shape[::-1], dtype) for shape, dtype in weights}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and (tuple(tensor.shape), tensor.dtype) not in weights:
            storages[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    x = torch.empty(batch, config.token_width, *config.grid)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = model(x, torch.empty(batch), torch.empty(batch, dtype=torch.long))
        loss = (out.float() - x).square().mean()
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def measured_peak(config: DiTDHConfig, batch: int, *, checkpointing: bool) -> int:
    """Peak bytes allocated in two compiled training steps on this machine's GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build_model(config).cuda()
    model.recompute_activations = checkpointing
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    x = torch.randn(batch, config.token_width, *config.grid, device="cuda")
    t, y = torch.rand(batch, device="cuda"), torch.zeros(batch, dtype=torch.long, device="cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = (model(x, t, y).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, list(model.parameters()), 0.1)
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="compare with peaks on this machine's GPU")
    parser.add_argument("--batch", type=int, default=16, help="micro-batch of the measured steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()
    rows = []
    lines = [
        "| network | pixels | activation checkpointing | fixed, GB | a sample, MB | "
        + " | ".join(f"{card} GB" for card in CARDS)
        + " |",
        "|---" * (5 + len(CARDS)) + "|",
    ]
    for size in SIZES:
        for pixels, grid in GRIDS.items():
            config = dit_dh_config(size, token_width=768, grid=grid, num_classes=1000)
            for checkpointing in (False, True):
                found = need(config, checkpointing=checkpointing)
                batches = [found.fits(card) for card in CARDS]
                row: dict[str, Any] = {
                    "size": size,
                    "pixels": pixels,
                    "checkpointing": checkpointing,
                    "fixed_bytes": found.fixed,
                    "sample_bytes": found.per_sample,
                    "largest_micro_batch": dict(zip(map(str, CARDS), batches, strict=True)),
                }
                if arguments.measure and torch.cuda.is_available():
                    row["measured_peak_bytes"] = measured_peak(
                        config, arguments.batch, checkpointing=checkpointing
                    )
                    row["computed_peak_bytes"] = found.fixed + arguments.batch * found.per_sample
                rows.append(row)
                lines.append(
                    f"| DiT-DH-{size.upper()} | {pixels} | {'on' if checkpointing else 'off'} | "
                    f"{found.fixed / GB:.1f} | {found.per_sample / 1e6:.0f} | {' | '.join(map(str, batches))} |"
                )
                print(lines[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
