"""From tokens as they are stored to numbers, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shards import Store
from train.models.normalizer import LatentNormalizer


class Dequantizer(nn.Module):
    """Makes float32 of a store's tokens, whatever it stores them as.

    Only int8 is more than a cast: each channel has a table of what its 255 codes encode.

    Attributes:
        levels: float32 [D · 256], entry 256 d + code + 128; None for the floating types.
    """

    levels: Tensor | None
    first: Tensor | None

    def __init__(self, table: Tensor | None) -> None:
        """Build from the table of a code, float32 [D, 256], or None for floating types."""
        super().__init__()
        self.register_buffer("levels", None if table is None else table.flatten())
        # Where code 0 of each channel stands; int32 holds 8 million channels and halves the traffic.
        first = None if table is None else torch.arange(len(table)) * table.shape[1] + 128
        self.register_buffer("first", None if first is None else first.int())

    @classmethod
    def of(cls, store: Store) -> Dequantizer:
        """Return the dequantizer of a store's tokens."""
        code = store.code
        return cls(None if code is None else torch.from_numpy(code.table.copy()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [b, N, D] as stored → float32."""
        if self.levels is None or self.first is None:
            return tokens.float()
        entries = tokens + self.first
        return self.levels.index_select(0, entries.flatten()).view(entries.shape)


def latents_of(dequantizer: Dequantizer, normalizer: LatentNormalizer) -> Callable[[Tensor], Tensor]:
    """Convert tokens [b, N, D] as stored to normalised latents float32 [b, D, h, w].

    On CUDA decoding and normalising are compiled into one pass over the tokens, which reads each stored number once
    and writes each latent once.
    """

    def latents(tokens: Tensor) -> Tensor:
        return normalizer.to_latents(dequantizer(tokens))

    if normalizer.variance.device.type != "cuda":
        return latents
    # The size of the last micro-batch of a step may differ: one program for all of them.
    return torch.compile(latents, dynamic=True)


def stored_tensor(array: NDArray[Any], dtype: str) -> Tensor:
    """Return an array of stored tokens as a tensor over the same memory; numpy knows bfloat16 only by its bits."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
