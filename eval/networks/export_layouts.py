"""Snapshots to the layouts of `eval/export.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from eval.networks.diffusers_layout import write_autoencoder
from shards import EncoderIdentity, UsageError
from train.models.vit_decoder import ViTDecoder
from train.weights.published import save_state_dict, save_statistics
from train.weights.snapshot import Snapshot


def export_published(snapshot: Snapshot, out: Path) -> None:
    """Write `stage2_model.pt` and `stat.pt` of a DiT, or `model.pt` of a decoder."""
    out.mkdir(parents=True, exist_ok=True)
    if snapshot.kind == "decoder":
        save_state_dict(snapshot.model, out / "model.pt")
        return
    save_state_dict(snapshot.model, out / "stage2_model.pt")
    if snapshot.normalizer is not None:
        save_statistics(snapshot.normalizer, out / "stat.pt")


def export_diffusers(
    snapshot: Snapshot, encoder: Path, dit: Snapshot | None, out: Path, *, transformers: Literal[4, 5]
) -> None:
    """Join a decoder's snapshot with its encoder's weights and, if given, a DiT's latent statistics.

    Raises:
        UsageError: the snapshot is not a decoder's, or the DiT belongs to another encoder.
    """
    if not isinstance(snapshot.model, ViTDecoder):
        raise UsageError("diffusers' layout of an autoencoder holds a decoder; the snapshot is a DiT's")
    identity = EncoderIdentity.from_dict(snapshot.meta.encoder)
    if dit is not None:
        identity.require_same(EncoderIdentity.from_dict(dit.meta.encoder), what="the DiT's snapshot")
    write_autoencoder(
        out,
        snapshot.model,
        encoder,
        None if dit is None else dit.normalizer,
        input_size=identity.input_size,
        transformers=transformers,
    )
