"""A compressor in the place of an image encoder: compact latents of tokens that a store holds already."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.encoders.frozen import Encoder
from shards import EncoderIdentity, Store, UsageError
from train.models.dequantize import Dequantizer
from train.weights.compressor import Compressor


class LatentEncoder:
    """A compressor's first half, from tokens as they are stored to latents.

    Attributes:
        identity: What names the latents it makes.

    Args:
        compressor: The compressor.
        store: The store whose tokens it is given.
        precision: Arithmetic of the network, `float32` or `bfloat16`.
    """

    def __init__(self, compressor: Compressor, store: Store, precision: str) -> None:
        self.identity: EncoderIdentity = compressor.identity(precision)
        self.device = torch.device("cpu")
        self._precision = precision
        self._compressor = compressor
        self._dequantizer = Dequantizer.of(store)
        self._network: Callable[[Tensor], Tensor] = compressor.encode

    def to_device(self, device: torch.device, precision: str) -> "LatentEncoder":
        """Move the compressor to `device`, to compute in `float32` or `bfloat16` (matrix products only)."""
        if precision != self._precision:
            raise UsageError(f"the field was begun with --precision {precision}, got {self._precision}")
        torch.set_float32_matmul_precision("highest")
        self.device = device
        self._compressor.network.to(device)
        self._dequantizer.to(device)
        return self

    def compile_trunk(self) -> None:
        """Run the network through torch.compile from now on."""
        self._network = torch.compile(self._compressor.encode)

    def require_class_token(self) -> None:
        """Refuse class tokens.

        Raises:
            UsageError: Always: a compressor has none.
        """
        raise UsageError("--class-token: a compressor has no class token; leave it out")

    @torch.inference_mode()
    def encode(self, tokens: Tensor) -> Tensor:
        """Return latents float32 [B, K, F] of tokens as stored [B, N, C]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            return self._network(self._dequantizer(tokens)).float()


RowEncoder = Encoder | LatentEncoder
"""Makes what a store holds of a row: of images, or of another store's tokens."""
