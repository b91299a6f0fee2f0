"""Tokens between the device and the store: torch on one side, numpy storage types on the other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.encode.buffers import page_aligned
from shards import Int8Code

TORCH_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
"""How torch sees each storage type."""


def as_numpy(values: Tensor) -> NDArray[Any]:
    """Return a tensor as the numpy array that the store writes, over the same memory; bfloat16 as its bits, uint16."""
    if values.dtype is torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of some rows in their storage type.

    Attributes:
        values: [B, N, D]; int8 as codes.
        square_error: What int8 loses: each row's sum over tokens of squared errors, float64 [B, D]; None for other
            storage types.
        class_token: float16 [B, D]; None where none is stored.
    """

    values: Tensor
    square_error: Tensor | None
    class_token: Tensor | None = None

    def copies_into(self, other: "StoredTokens") -> Iterator[tuple[Tensor, Tensor]]:
        """Return pairs of tensors: each with the one of another buffer to copy it into."""
        yield self.values, other.values
        if self.square_error is not None and other.square_error is not None:
            yield self.square_error, other.square_error
        if self.class_token is not None and other.class_token is not None:
            yield self.class_token, other.class_token

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        parts = (self.values, self.square_error, self.class_token)
        return sum(part.nbytes for part in parts if part is not None)

    def as_numpy(self) -> NDArray[Any]:
        """`values` as numpy and the store see the same memory."""
        return as_numpy(self.values)


class TokenStorage:
    """Brings tokens into a store's type, on the device where they are: fewer bytes then cross to the host.

    Args:
        dtype: Storage type.
        code: What int8 numbers encode.
    """

    def __init__(self, dtype: str, code: Int8Code | None) -> None:
        self.dtype = TORCH_TYPES[dtype]
        self._code = code
        self._boundaries, self._levels = torch.empty(0), torch.empty(0)
        if code is not None:
            self._boundaries = torch.from_numpy(code.boundaries)
            self._levels = torch.from_numpy(code.table[:, 1:].copy())

    def empty(
        self, shape: tuple[int, int, int], *, class_token: bool = False, pin_memory: bool
    ) -> StoredTokens:
        """Return memory on the host for rows [B, N, D], with class tokens if they are stored."""
        square_error = None
        if self._code is not None:
            square_error = torch.empty((shape[0], shape[2]), dtype=torch.float64, pin_memory=pin_memory)
        values = page_aligned(shape, self.dtype, pin_memory=pin_memory)
        if not class_token:
            return StoredTokens(values, square_error)
        of_classes = torch.empty((shape[0], shape[2]), dtype=torch.float16, pin_memory=pin_memory)
        return StoredTokens(values, square_error, of_classes)

    def __call__(self, tokens: Tensor, class_token: Tensor | None = None) -> StoredTokens:
        """Tokens float32 [B, N, D], and class tokens [B, D] if there are any, as they will be stored."""
        stored = self._stored(tokens)
        if class_token is None:
            return stored
        return replace(stored, class_token=class_token.to(torch.float16))

    def _stored(self, tokens: Tensor) -> StoredTokens:
        if self._code is None:
            return StoredTokens(tokens.to(self.dtype), None)
        if tokens.device.type == "cpu":
            codes, square_error = self._code.encode_rows(tokens.numpy())
            return StoredTokens(torch.from_numpy(codes), torch.from_numpy(square_error))
        return self.code_on_device(tokens)

    def code_on_device(self, tokens: Tensor) -> StoredTokens:
        """int8 codes by torch alone, the same numbers as `shards.values.quantize` gives."""
        self._boundaries = self._boundaries.to(tokens.device)
        self._levels = self._levels.to(tokens.device)
        rows, num_tokens, width = tokens.shape
        by_channel = tokens.reshape(-1, width).T.contiguous()
        entries = torch.searchsorted(self._boundaries, by_channel)
        error = (self._levels.gather(1, entries) - by_channel).T.view(rows, num_tokens, width)
        codes = (entries - 127).to(torch.int8).T.reshape(rows, num_tokens, width)
        return StoredTokens(codes, error.square().sum(dim=1, dtype=torch.float64))
