"""Compressors as others use them: from tokens to compact latents, back, and by what identity.

A flat compressor has a snapshot of its own, with both halves. A pooling decoder brings its compressor with it: the
affine map over windows of tokens that it was trained with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards import CompressorIdentity, EncoderIdentity, IdentityMismatchError, UsageError
from train.models.flat import FlatVAE
from train.models.pool import TokenPool
from train.models.vit_decoder import ViTDecoder
from train.weights.snapshot import Snapshot, load_snapshot

VALUE = "mean"
"""What a store keeps of an image's latents: the mean of their distribution, as the published generator learns from."""


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """A trained compressor."""

    path: Path
    """The snapshot's file."""
    network: FlatVAE | TokenPool
    """What makes the latents, and of a flat compressor the tokens again; in evaluation mode."""
    snapshot: Snapshot
    """Where it comes from."""

    @property
    def untrained(self) -> bool:
        """Whether it has not taken a single step."""
        return self.snapshot.meta.step == 0

    @property
    def source(self) -> EncoderIdentity:
        """The encoder of the tokens it was trained on."""
        return EncoderIdentity.from_dict(self.snapshot.meta.encoder)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return latents float [B, K, F] of tokens float [B, N, C]."""
        return self.network.encode(tokens)

    def decode(self, latents: Tensor) -> Tensor:
        """Return tokens float [B, N, C] of latents float [B, K, F]."""
        assert isinstance(self.network, FlatVAE), "pooled latents are decoded by their own decoder"
        return self.network.decode(latents)

    def identity(self, precision: str) -> EncoderIdentity:
        """Return the identity of the latents it makes in an arithmetic, `float32` or `bfloat16`."""
        meta, source, network = self.snapshot.meta, self.source, self.network
        assert meta.dtype is not None
        config = network.config
        makes_latents: nn.Module
        if isinstance(network, FlatVAE):
            name, makes_latents = "flat-vae", network.encoder
            shape = f"{network.config.num_latents}x{network.config.latent_width}"
        else:
            name, makes_latents = "pool", network
            shape = "x".join(map(str, network.config.window))
        made_by = CompressorIdentity(
            source=source,
            source_dtype=meta.dtype,
            source_code=meta.code,
            name=name,
            config=config.deciding(),
            weights_digest=weights_digest(makes_latents),
            value=VALUE,
            precision=precision,
        )
        return replace(
            source,
            name=f"{name}[{shape}] of {source.name}",
            weights="random:untrained compressor" if self.untrained else source.weights,
            grid=config.latent_grid,
            width=config.latent_width,
            prefix_tokens=0,
            final_norm="none",
            compressor=made_by,
        )

    def require_fits(self, encoder: EncoderIdentity, dtype: str, code: str | None, *, what: str) -> None:
        """Refuse stored tokens that it was not trained on.

        Args:
            encoder: the encoder of the tokens.
            dtype: their storage type.
            code: digest of their int8 code.
            what: what to call the store in an error.

        Raises:
            IdentityMismatchError: they are another encoder's or stored otherwise.
        """
        self.source.require_same(encoder, what=what)
        meta = self.snapshot.meta
        if (meta.dtype, meta.code) != (dtype, code):
            of = "" if code is None and meta.code is None else f", with the int8 codes {meta.code} and {code}"
            raise IdentityMismatchError(
                f"{self.path} was trained on tokens stored as {meta.dtype}, and those of {what} are {dtype}{of}: their "
                "latents would differ; train a compressor on that store, or give the store it was trained on"
            )

    def require_made(self, latents: EncoderIdentity, *, what: str) -> None:
        """Refuse latents that it did not make.

        Raises:
            UsageError: they are an encoder's tokens, which need no compressor.
            IdentityMismatchError: they are another compressor's, with the differences.
        """
        if latents.compressor is None:
            raise UsageError(
                f"{what} belongs to an encoder's own tokens, not to latents of a compressor; leave --compressor out"
            )
        self.identity(latents.compressor.precision).require_same(latents, what=what)


def load_compressor(path: Path, device: torch.device | str = "cpu", *, decoders: bool = False) -> Compressor:
    """Read a compressor.

    Args:
        path: its snapshot.
        device: where the network goes.
        decoders: also take a pooling decoder's snapshot, whose pooling makes latents.

    Raises:
        UsageError: the snapshot holds no compressor, or does not say what it was trained on.
        UserError: there is no such file, or it is not a snapshot of this version.
    """
    snapshot = load_snapshot(path, device)
    pooling = pooling_of(snapshot, path)
    if pooling is not None and decoders:
        return pooling
    if pooling is not None:
        raise UsageError(
            f"{path} is a decoder that pools: it decodes tokens and its own latents, and is used alone; give it as "
            "--decoder and leave --compressor out"
        )
    if not isinstance(snapshot.model, FlatVAE):
        raise UsageError(
            "--compressor must be the snapshot of a compressor (train/compressor.py)"
            f"{', or of a decoder that pools' * decoders}; {path} is a {snapshot.kind}'s"
        )
    if snapshot.meta.dtype is None:
        raise UsageError(f"{path} does not say how the tokens it was trained on are stored; train it again")
    return Compressor(path=path, network=snapshot.model, snapshot=snapshot)


def pooling_of(snapshot: Snapshot, path: Path) -> Compressor | None:
    """Return the compressor that a pooling decoder brings with it; None for every other network."""
    if not isinstance(snapshot.model, ViTDecoder) or snapshot.model.pool is None:
        return None
    return Compressor(path=path, network=snapshot.model.pool, snapshot=snapshot)


def require_compressor(latents: EncoderIdentity, compressor: Path | None, *, what: str) -> None:
    """Refuse to decode latents of a sequence without the compressor that made them.

    Raises:
        UsageError: there is none, though the latents need one to become tokens.
    """
    if compressor is None and latents.positions == "sequence":
        raise UsageError(
            f"{what} belongs to the latents of a compressor, which are on no grid: a decoder of pixels takes them from "
            "the tokens that the compressor makes of them; decode through it: --compressor SNAPSHOT"
        )


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 over names, shapes and float32 values of a network's state, in order of name."""
    sha = hashlib.sha256()
    state: Mapping[str, Any] = network.state_dict()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{name}{tuple(values.shape)}".encode())
        sha.update(values.numpy().tobytes())
    return sha.hexdigest()
