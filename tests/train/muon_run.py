"""A few Muon steps of a small network in this process of a team: what test_muon.py starts with torchrun.

Usage: muon_run.py plain|ddp|fsdp FILE. The gradient of the last step but one is not finite and that step is skipped.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from train.engine.muon import Muon
from train.engine.optimizer import optimizer_tensors

BATCH, STEPS = 8, 4


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(mode, path):
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    # Odd numbers of rows and of equal matrices: shares of the processes differ, and some have none.
    layers = [nn.Linear(5, 7), *(nn.Linear(7, 7) for _ in range(3)), nn.Linear(7, 1)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    if mode == "fsdp":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    called = DistributedDataParallel(model) if mode == "ddp" else model
    optimizer = Muon(list(model.parameters()), lr=0.02, weight_decay=0.1)
    inputs = torch.randn(STEPS, BATCH, 5, generator=torch.Generator().manual_seed(1))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        bad = step == STEPS - 2
        loss = (called(inputs[step, share]) - inputs[step, share, :1]).square().mean()
        (loss * float("nan") if bad else loss).backward()
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        optimizer.zero_grad()
    found = {f"weight/{name}": whole(p) for name, p in model.named_parameters()}
    found |= {name: whole(value) for name, value in optimizer_tensors(model, optimizer).items()}
    if rank == 0:
        torch.save(found, path)
    if world > 1:
        dist.destroy_process_group()


main(*sys.argv[1:])
