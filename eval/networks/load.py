"""Load the networks of an evaluation and make sure that they belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.networks.diffusers_layout import AUTOENCODER_FILES
from eval.networks.published import published_decoder, published_dit
from eval.settings import DecoderOutput, Precision
from shards import EncoderIdentity, IdentityMismatchError, Store, UsageError
from train.engine.arithmetic import allow_tf32
from train.models.config import ViTDecoderConfig
from train.models.cost import forward_flops
from train.models.layers import Attention
from train.models.vit_decoder import ViTDecoder
from train.weights.snapshot import Snapshot, is_snapshot, load_snapshot
from train.weights.tensor_files import file_digest


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """From raw tokens, or a compressor's latents, to pixels, in the precision of the run."""

    network: Callable[[Tensor], Tensor]
    precision: Precision
    image_size: tuple[int, int]
    expand: Callable[[Tensor], Tensor] | None = None
    """Makes raw tokens of latents first, in float32; None: raw tokens come in."""
    flops: int = 0
    """FLOPs of the network for an image; 0: not known."""

    @torch.inference_mode()
    def pixels(self, tokens: Tensor) -> Tensor:
        """Return pixels float32 [B, 3, H, W], unclamped, of raw tokens [B, N, D] or latents [B, K, F]."""
        raw = tokens.float()
        if self.expand is not None:
            raw = self.expand(raw)
        with autocast(tokens.device, self.precision):
            return self.network(raw).float()


def load_dit(
    path: Path,
    device: torch.device,
    store: Store | None = None,
    statistics: Path | None = None,
    base_depth: int | None = None,
) -> Snapshot:
    """Return a DiT's snapshot, or a published file made one.

    Args:
        path: The file.
        device: Where the network goes.
        store: What a published file belongs to; not used for a snapshot, which knows.
        statistics: Published latent statistics of a published file, instead of the store's.
        base_depth: Where a published file of RAEv2 has its base output; None for the published network's.

    Raises:
        UsageError: It is a decoder's snapshot, or a published file without a store.
        UserError: It is broken or does not fit the store.
    """
    if not is_snapshot(path):
        if store is None:
            raise _no_origin(path)
        return published_dit(path, store, statistics, device, base_depth)
    snapshot = load_snapshot(path, device)
    if snapshot.kind != "dit" or snapshot.normalizer is None:
        raise UsageError(f"a DiT's snapshot is needed to sample, {path} is a {snapshot.kind}'s")
    return snapshot


def load_decoder(
    path: Path,
    device: torch.device,
    encoder: EncoderIdentity | None = None,
    output: DecoderOutput = "auto",
) -> Snapshot:
    """Return a decoder's snapshot, or a published file made one.

    Args:
        path: The file, or a folder in diffusers' layout.
        device: Where the network goes.
        encoder: What a published file belongs to; not used for a snapshot, which knows.
        output: What a published decoder puts out; of a snapshot, what it must.

    Raises:
        UsageError: It is a DiT's snapshot, or a published file without an encoder, or puts out something else.
        UserError: It is broken or does not fit the encoder.
    """
    if not is_snapshot(path):
        if encoder is None:
            raise _no_origin(path)
        return published_decoder(path, encoder, device, output)
    snapshot = load_snapshot(path, device)
    if snapshot.kind != "decoder":
        raise UsageError(f"--decoder must be a decoder's snapshot, {path} is a {snapshot.kind}'s")
    assert isinstance(snapshot.config, ViTDecoderConfig)
    if output not in ("auto", snapshot.config.output):
        raise UsageError(
            f"--decoder-output is {output}, and the snapshot {path} says {snapshot.config.output}; "
            "leave --decoder-output out"
        )
    return snapshot


def _no_origin(path: Path) -> UsageError:
    return UsageError(
        f"a published file does not say which encoder it belongs to, {path} is one; give --encoder-of STORE"
    )


def decoder_of(
    snapshot: Snapshot, precision: Precision, expand: Callable[[Tensor], Tensor] | None = None
) -> Decoder:
    """Return the decoder of a snapshot, ready to use; `expand` is `Decoder.expand`."""
    network = snapshot.model
    assert isinstance(network, ViTDecoder)
    return Decoder(
        network=network,
        precision=precision,
        image_size=network.config.image_size,
        expand=expand,
        flops=forward_flops(network.config),
    )


def require_same_encoder(ours: Snapshot, theirs: EncoderIdentity, what: str) -> None:
    """Refuse a network or store that belongs to another encoder.

    Raises:
        IdentityMismatchError: With one line for each difference.
    """
    EncoderIdentity.from_dict(ours.meta.encoder).require_same(theirs, what=what)


def require_fitting_guide(model: Snapshot, guide: Snapshot, path: Path) -> None:
    """Refuse a guide that does not see the same latents and classes as the model it guides.

    Raises:
        IdentityMismatchError: It comes from another encoder or its latents are normalised otherwise.
        UsageError: It knows other classes, or predicts something else.
    """
    require_same_encoder(model, EncoderIdentity.from_dict(guide.meta.encoder), f"the guide {path}")
    if guide.meta.num_classes != model.meta.num_classes:
        raise UsageError(
            f"a guide must know the same classes, {path} has {guide.meta.num_classes} "
            f"and the model {model.meta.num_classes}"
        )
    own, other = ((snapshot.meta.prediction, snapshot.meta.time_floor) for snapshot in (model, guide))
    if own != other:
        raise UsageError(
            f"a guide must predict what the model predicts; prediction and time floor are {own} of the model and "
            f"{other} of {path}"
        )
    assert model.normalizer is not None
    assert guide.normalizer is not None
    if not model.normalizer.same_as(guide.normalizer):
        raise IdentityMismatchError(
            f"a guide must see latents normalised alike, the statistics in {path} differ from the model's; "
            "train both with the same statistics"
        )


def set_precision(precision: Precision) -> None:
    """Allow or forbid TensorFloat-32 in float32 matrix products and convolutions of this process."""
    allow_tf32(allowed=precision == "tf32")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context a network is called in."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def make_ready(network: nn.Module, precision: Precision, *, compiled: bool) -> None:
    """Make a network ready to be called often in the precision of the run.

    In bf16 the matrices of its blocks, nearly all of it, are rounded once instead of at every call; autocast gives the
    same bits either way. Where DiT normalises queries and keys their matrix stays, because its type says in what the
    norm is computed.

    Args:
        network: A diffusion transformer, a decoder or a compressor, only used to be called.
        precision: Its arithmetic.
        compiled: Compile it, block by block.
    """
    if precision == "bf16":
        for blocks in (child for child in network.children() if isinstance(child, nn.ModuleList)):
            kept = {
                part.qkv
                for part in blocks.modules()
                if isinstance(part, Attention) and part.q_norm is not None
            }
            for part in blocks.modules():
                if isinstance(part, nn.Linear) and part not in kept:
                    part.to(torch.bfloat16)
    if compiled:
        network.compile()


def path_digest(path: Path) -> str:
    """Return the SHA-256 of a file of weights; of a folder in diffusers' layout, that of its two files' digests."""
    if path.is_dir():
        parts = "".join(path_digest(path / name) for name in AUTOENCODER_FILES)
        return hashlib.sha256(parts.encode()).hexdigest()
    return file_digest(path)
