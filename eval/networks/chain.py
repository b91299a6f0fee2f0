"""From what a diffusion transformer makes to pixels: a decoder alone, or a compressor's decoder before it.

Each link says by its identity what it takes; a chain whose links do not fit is refused with the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.networks.load import Decoder, decoder_of, load_decoder, make_ready
from eval.settings import DecoderOutput, Precision
from shards import EncoderIdentity, UsageError
from train.weights.compressor import Compressor, load_compressor, pooling_of, require_compressor
from train.weights.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The networks between latents and pixels."""

    decoder: Decoder
    """Decodes latents to pixels."""
    snapshot: Snapshot
    """Where the decoder of pixels comes from."""
    compressor: Compressor | None
    """Makes tokens of the latents first; None: they are tokens, or the decoder of pixels takes them as they are."""

    def make_ready(self, precision: Precision, *, compiled: bool) -> None:
        """Make the networks ready to be called often; see `eval.networks.load.make_ready`."""
        make_ready(self.snapshot.model, precision, compiled=compiled)
        if self.compressor is not None:
            make_ready(self.compressor.network, "fp32", compiled=compiled)


def load_chain(
    decoder: Path,
    compressor: Path | None,
    device: torch.device,
    precision: Precision,
    *,
    latents: EncoderIdentity,
    published_for: EncoderIdentity | None,
    output: DecoderOutput = "auto",
    what: str,
) -> Chain:
    """Load what decodes latents, and check that the networks belong together.

    Args:
        decoder: Snapshot of a decoder, or a published file.
        compressor: Snapshot of the compressor that made the latents, where one did.
        device: Where the networks go.
        precision: Arithmetic of the decoder; a compressor's is float32.
        latents: What the latents are.
        published_for: What a published decoder belongs to, which does not say it; None: not known.
        output: What a published decoder puts out; see `eval.networks.load.load_decoder`.
        what: What to call the latents' owner in an error.

    Raises:
        UsageError: A compressor is missing or too many.
        IdentityMismatchError: A link belongs to something else, with the difference.
    """
    require_compressor(latents, compressor, what=what)
    pooled = latents.compressor is not None and latents.positions == "grid"
    if pooled and compressor is not None:
        raise UsageError(
            f"{what} belongs to latents that a decoder pooled, and that decoder decodes them itself; leave "
            "--compressor out"
        )
    loaded = None
    if compressor is not None:
        loaded = load_compressor(compressor, device)
        loaded.require_made(latents, what=what)
    tokens = tokens_of(latents)
    published = None if published_for is None else tokens_of(published_for)
    snapshot = load_decoder(decoder, device, published, output)
    tokens.require_same(EncoderIdentity.from_dict(snapshot.meta.encoder), what=f"the decoder {decoder}")
    if pooled:
        pooling = pooling_of(snapshot, decoder)
        if pooling is None:
            raise UsageError(
                f"{what} belongs to latents that a decoder pooled, and {decoder} does not pool; give the decoder whose "
                "pooling made them"
            )
        pooling.require_made(latents, what=what)
    expand = None if loaded is None else loaded.decode
    return Chain(decoder=decoder_of(snapshot, precision, expand), snapshot=snapshot, compressor=loaded)


def tokens_of(latents: EncoderIdentity) -> EncoderIdentity:
    """Return the encoder of the tokens that a pixel decoder takes."""
    return latents if latents.compressor is None else latents.compressor.source


def through(compressor: Compressor | None) -> Callable[[Tensor], Tensor] | None:
    """Return a function that passes tokens through a compressor, float32 [B, N, C] both; None without one."""
    if compressor is None:
        return None

    @torch.no_grad()
    def recoded(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return compressor.decode(compressor.encode(tokens.float()))

    return recoded
