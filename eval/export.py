"""Write trained networks in the layouts other programs read.

    python eval/export.py SNAPSHOT --layout published --out DIR
    python eval/export.py DECODER_SNAPSHOT --layout diffusers --encoder model.safetensors [--dit SNAPSHOT] --out DIR

"published" gives RAE's own files: `stage2_model.pt` and `stat.pt` of a DiT, `model.pt` of a decoder; of RAEv2's
transformer `checkpoint.pt`, a bare state dict, and `stats.pt`.
"diffusers" joins a decoder with its encoder's weights, a file in transformers' layout, to what
`diffusers.AutoencoderRAE` loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eval.command import parse, run
from shards import EncoderIdentity, UsageError, require_output_folder

if TYPE_CHECKING:
    from train.weights.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write trained networks in the layouts other programs read."""

    snapshot: Path
    """Snapshot of a training run, RUN/snapshots/latest.safetensors."""
    out: Path
    """Folder to write to; it is made."""
    layout: Literal["published", "diffusers"] = "published"
    """RAE's own files, or what diffusers.AutoencoderRAE loads (decoders only)."""
    encoder: Path | None = None
    """diffusers: the encoder's weights in transformers' layout, such as model.safetensors of its repository."""
    dit: Path | None = None
    """diffusers: a DiT's snapshot, whose latent statistics go along; without it latents stay raw tokens."""
    transformers: Literal[4, 5] = 4
    """diffusers: major version of transformers whose names the encoder gets; published files have 4's."""


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    settings = parse(arguments, ExportSettings, "eval/export.py")
    for path in (settings.snapshot, settings.encoder, settings.dit):
        if path is not None and not path.is_file():
            raise UsageError(f"a file of weights is needed, found none at {path}")
    require_output_folder(settings.out)
    from train.weights.snapshot import load_snapshot

    snapshot = load_snapshot(settings.snapshot)
    require_layout(snapshot, settings.snapshot)
    if settings.layout == "published":
        export_published(snapshot, settings.out)
        return 0
    if settings.encoder is None:
        raise UsageError("diffusers holds the encoder too: give its weights with --encoder")
    dit = None if settings.dit is None else load_snapshot(settings.dit)
    if dit is not None and settings.dit is not None:
        require_layout(dit, settings.dit)
    export_diffusers(snapshot, settings.encoder, dit, settings.out, transformers=settings.transformers)
    return 0


def require_layout(snapshot: Snapshot, path: Path) -> None:
    """Refuse what other programs have no layout for.

    Raises:
        UsageError: It is a compressor, or belongs to the latents of one.
    """
    from train.weights.compressor import pooling_of

    derived = EncoderIdentity.from_dict(snapshot.meta.encoder).compressor is not None
    pools = pooling_of(snapshot, path) is not None
    if snapshot.kind == "compressor" or derived or pools:
        what = (
            "for the latents of a compressor"
            if derived
            else "a decoder that pools"
            if pools
            else "a compressor"
        )
        raise UsageError(
            f"the published layouts hold no compressors, and {path} is {what}; export the decoder of its tokens, which "
            "our own commands then take beside --compressor"
        )


def export_published(snapshot: Snapshot, out: Path) -> None:
    """Write the published files of a DiT (weights and statistics) or of a decoder (weights)."""
    from train.models.config import InContextDiTConfig
    from train.models.in_context_dit import InContextDiT, InContextDiTDH
    from train.weights.published import save_state_dict, save_statistics

    out.mkdir(parents=True, exist_ok=True)
    if snapshot.kind == "decoder":
        save_state_dict(snapshot.model, out / "model.pt")
        return
    raev2 = isinstance(snapshot.config, InContextDiTConfig)
    if isinstance(snapshot.model, InContextDiT | InContextDiTDH):
        snapshot.model.alignment = None  # published files hold no projector
    save_state_dict(snapshot.model, out / ("checkpoint.pt" if raev2 else "stage2_model.pt"))
    if snapshot.normalizer is not None:
        save_statistics(snapshot.normalizer, out / ("stats.pt" if raev2 else "stat.pt"))


def export_diffusers(
    snapshot: Snapshot, encoder: Path, dit: Snapshot | None, out: Path, *, transformers: Literal[4, 5]
) -> None:
    """Join a decoder's snapshot with its encoder's weights and, if given, a DiT's latent statistics.

    Raises:
        UsageError: The snapshot is not a decoder's.
        IdentityMismatchError: The DiT belongs to another encoder.
    """
    from eval.networks.diffusers_layout import write_autoencoder
    from train.models.vit_decoder import ViTDecoder

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


if __name__ == "__main__":
    run(main)
