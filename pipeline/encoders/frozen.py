"""A frozen image encoder: from pixels to tokens and class tokens, of one combination of blocks or several at once."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.encoders.aggregation import Aggregation, choose_aggregation, combine
from pipeline.encoders.families import Family, Triple
from shards import EncoderIdentity, UsageError


@dataclass(frozen=True)
class EncoderOutput:
    """What one combination of blocks gives for some images.

    Attributes:
        tokens: Raw tokens, float32 [B, N, D].
        class_token: The highest block's class token after the same norm, float32 [B, D]; None if it was not asked for.
    """

    tokens: Tensor
    class_token: Tensor | None


class Encoder(nn.Module):
    """A frozen encoder, from pixels to raw tokens.

    Args:
        trunk: timm model whose final norm is the tokens'.
        identity: What it is; names the store's tokens.
        aggregation: Which blocks its tokens come from.
        family: Its conventions.
        mean: Pixel mean, RGB.
        std: Pixel standard deviation, RGB.
    """

    def __init__(
        self,
        trunk: nn.Module,
        identity: EncoderIdentity,
        aggregation: Aggregation,
        family: Family,
        mean: Triple,
        std: Triple,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.identity = identity
        self.aggregation = aggregation
        self.precision = "float32"
        self._family = family
        self._pixel_statistics = mean, std
        self._blocks = self._run_blocks
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False).eval()

    def of_blocks(self, layers: Sequence[int], combination: str | None, option: str) -> "Encoder":
        """Return the encoder that combines other blocks of the same network; both share it.

        Args:
            layers: Blocks, counted from 0, ascending.
            combination: How; None takes the family's.
            option: What names them, for messages.

        Raises:
            UsageError: If there are no such blocks.
        """
        depth = len(self.trunk.blocks)  # type: ignore[arg-type]
        aggregation = choose_aggregation(
            depth,
            self.identity.name,
            layers,
            combination,
            option=option,
            spatial_mean=self._family.spatial_mean,
        )
        identity = dataclasses.replace(self.identity, aggregation=aggregation.identity(depth))
        return Encoder(self.trunk, identity, aggregation, self._family, *self._pixel_statistics)

    def require_class_token(self) -> None:
        """Refuse a network without class token.

        Raises:
            UsageError: Naming it.
        """
        if getattr(self.trunk, "cls_token", None) is None:
            raise UsageError(
                f"--class-token: {self.identity.name} has no class token; leave it out, or name another --encoder"
            )

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (torch's own signature)
        """Stay in evaluation mode: in training mode, networks with rotary positions scale coordinates at random."""
        del mode
        return super().train(mode=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.get_buffer("mean").device

    def to_device(self, device: torch.device, precision: str) -> "Encoder":
        """Move the encoder to `device`, to compute in `float32` or `bfloat16` (matrix products only)."""
        if precision not in ("float32", "bfloat16"):
            raise UsageError(f"--precision must be float32 or bfloat16, got {precision}")
        self.precision = precision
        if precision == "float32":
            # The reference's numbers are float32 throughout; on a GPU convolutions would silently use TF32.
            torch.backends.cudnn.allow_tf32 = False
        return self.to(device)

    def compile_trunk(self) -> None:
        """Run the network through torch.compile from now on."""
        self._blocks = torch.compile(self._run_blocks)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return the network's input: float, resized, normalised.

        Args:
            pixels: uint8 [B, 3, P, P] in 0..255, or float [B, 3, P, P] in [0, 1].

        Returns:
            float32 [B, 3, S, S] for input size S; a resize may overshoot [0, 1] and is not clamped.

        Source:
            github:bytetriper/RAE at a4d18c4, src/stage1/rae.py `RAE.encode`.
        """
        values = pixels.float()
        if not pixels.is_floating_point():
            values = values / 255
        sizes = [self.identity.input_size]
        if self._family.image_patch is not None:
            sizes = [self.identity.grid[0] * self._family.image_patch, *sizes]
        for size in sizes:
            if values.shape[-2:] != (size, size):
                values = F.interpolate(values, size=(size, size), mode="bicubic", align_corners=False)
        return (values - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, pixels: Tensor) -> Tensor:
        """Return raw tokens float32 [B, N, D] of pixels uint8 [B, 3, P, P] or float [B, 3, P, P] in [0, 1]."""
        return self.tokens_of(self.prepare(pixels))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode as `forward` does, without any gradient state."""
        tokens: Tensor = self(pixels)
        return tokens

    def tokens_of(self, normalised: Tensor) -> Tensor:
        """Return raw tokens float32 [B, N, D] of normalised pixels float32 [B, 3, S, S]."""
        (output,) = self.outputs_of(normalised, (self.aggregation,), class_token=False)
        return output.tokens

    @torch.inference_mode()
    def encode_all(
        self, pixels: Tensor, aggregations: Sequence[Aggregation], *, class_token: bool
    ) -> list[EncoderOutput]:
        """Return the tokens of several combinations of blocks, from one pass of the network.

        Args:
            pixels: As `prepare` takes them.
            aggregations: What is wanted.
            class_token: Whether each one's class token is wanted too.
        """
        return self.outputs_of(self.prepare(pixels), tuple(aggregations), class_token=class_token)

    def outputs_of(
        self, normalised: Tensor, aggregations: tuple[Aggregation, ...], *, class_token: bool
    ) -> list[EncoderOutput]:
        """Encode normalised pixels float32 [B, 3, S, S] as `encode_all` does, with gradients."""
        low = self.precision == "bfloat16"
        with torch.autocast(normalised.device.type, dtype=torch.bfloat16, enabled=low):
            tokens, class_tokens = self._blocks(normalised, aggregations, class_token)
        return [EncoderOutput(*pair) for pair in zip(tokens, class_tokens, strict=True)]

    def _run_blocks(
        self,
        normalised: Tensor,
        aggregations: tuple[Aggregation, ...],
        class_token: bool,  # noqa: FBT001
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the network as it is compiled: tokens and class token by aggregation."""
        layers = sorted({layer for aggregation in aggregations for layer in aggregation.layers})
        outputs = self.trunk.forward_intermediates(  # type: ignore[operator]
            normalised,
            indices=layers,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # Networks without prefix tokens give patch tokens alone.
        pairs = [pair if isinstance(pair, tuple) else (pair, None) for pair in outputs]
        by_layer = dict(zip(layers, pairs, strict=True))
        tokens = combine(aggregations, ((layer, self._normed(pair[0])) for layer, pair in by_layer.items()))
        class_tokens = [
            self._normed(by_layer[aggregation.highest][1][:, 0]) if class_token else None
            for aggregation in aggregations
        ]
        return tokens, class_tokens

    def _normed(self, tokens: Tensor) -> Tensor:
        """Return tokens float [..., D] after the last norm, float32."""
        normed: Tensor = self.trunk.norm(tokens.float())  # type: ignore[operator]
        return normed.float()
