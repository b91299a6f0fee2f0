"""Feed a trainer of your own from a store, through Accelerate: `torchrun --nproc_per_node 2 ... STORE SAMPLES`."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from shards import SampleDataset, StreamBatchSampler


def main(store: str, num_samples: int, batch_size: int = 4, seen: int = 0) -> None:
    """Print which stream positions and rows each rank gets."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    dataset = SampleDataset(store, seed=0)
    sampler = StreamBatchSampler(batch_size, num_samples=num_samples, start_sample=seen)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=torch.utils.data.default_convert)
    for batch in accelerator.prepare(loader):
        tokens = batch["tokens"].float()  # [b, N, D] on this process's device; train here
        line = [
            accelerator.process_index,
            batch["position"].tolist(),
            batch["row"].tolist(),
            tokens.mean().item(),
        ]
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
