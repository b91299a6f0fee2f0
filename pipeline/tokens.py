"""Tokens between the device and the store: torch on one side, numpy storage types on the other."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STORED_AS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""The torch type of each floating storage type; rounding to it on the device halves what is copied back."""


def as_stored(tokens: Tensor) -> NDArray[Any]:
    """The same memory as numpy and the store see it; bfloat16 as its bits, uint16."""
    if tokens.dtype is torch.bfloat16:
        return tokens.view(torch.int16).numpy().view(np.uint16)
    return tokens.numpy()
