"""Published files in the place of snapshots: what they do not say is taken from a store and its encoder.

A published file holds weights alone. Its shape is read from its keys (`train.weights.infer`), every key must fit
(`train.weights.published`), and the encoder, the pixels' statistics, the latents' and the names of the classes come
from elsewhere. A folder in diffusers' layout (`eval.networks.diffusers_layout`) holds a decoder, its shape, the pixels'
statistics and the latents'. Whether the weights were really trained for that encoder cannot be seen; only what they do
say is checked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from eval.networks.diffusers_layout import read_autoencoder
from eval.settings import DecoderOutput
from shards import EncoderIdentity, IdentityMismatchError, Location, Store
from train.models.normalizer import LatentNormalizer
from train.settings.networks import pixel_statistics, published_output
from train.weights.infer import PublishedFileError
from train.weights.published import load_decoder, load_dit, load_statistics
from train.weights.snapshot import Snapshot, SnapshotMeta


def published_dit(
    path: Path,
    store: Store,
    statistics: Path | None,
    device: torch.device,
    base_depth: int | None = None,
) -> Snapshot:
    """Return a published diffusion transformer as a snapshot.

    The classes have the store's names where it has as many of them as the network.

    Args:
        path: RAE's `stage2_model.pt` or RAEv2's `checkpoint.pt`, bare or under `ema`, or .safetensors of the same keys.
        store: A store of the encoder the DiT was trained on.
        statistics: `stat.pt`, whose mean may be absent, then 0, or a folder in diffusers' layout; None for the
            store's own statistics.
        device: Where network and statistics go.
        base_depth: Deep blocks after which RAEv2's network has its base output; None for the published network's.

    Raises:
        PublishedFileError: A file cannot be read, or its keys do not fit.
        IdentityMismatchError: Network or statistics are for latents of another shape than the store's.
    """
    if path.is_dir():
        raise PublishedFileError(f"a published DiT is one file like stage2_model.pt, {path} is a folder")
    model = load_dit(path, base_depth=base_depth)
    config = model.config
    latent = (store.width, *store.grid)
    _require_shape(path, (config.token_width, *config.grid), latent)
    normalizer = _store_normalizer(store) if statistics is None else _published_normalizer(statistics)
    _require_shape(statistics or store.path, tuple(normalizer.variance.shape), latent)
    names = store.class_names if store.num_classes == config.num_classes else ()
    meta = _meta(store.recipe.encoder, names, config.num_classes)
    if config.kind == "in-context-dit":
        # No file says so. Source: configs/stage2 in github:nanovisionx/RAEv2 at 8a0d238.
        meta = replace(meta, prediction="x", time_floor=0.05)
    return Snapshot(
        model=model.to(device),
        config=config,
        normalizer=normalizer.to(device),
        meta=meta,
    )


def published_decoder(
    path: Path, encoder: EncoderIdentity, device: torch.device, output: DecoderOutput = "auto"
) -> Snapshot:
    """Return a published decoder as a snapshot, which reverts the encoder's pixel normalisation if need be.

    Args:
        path: `model.pt`, bare or under `ema`, .safetensors of the same keys, or a folder in diffusers' layout.
        encoder: The encoder whose tokens it was trained on.
        device: Where the network goes.
        output: What it puts out; auto is what published decoders of that encoder do.

    Raises:
        PublishedFileError: The file cannot be read, or its keys do not fit.
        IdentityMismatchError: It is for other tokens or pixels than the encoder's.
    """
    mean, std = pixel_statistics(encoder, published_output(encoder) if output == "auto" else output)
    if path.is_dir():
        model = read_autoencoder(path).decoder
        config = model.config
        _require_shape(path, (config.token_width, *config.grid), (encoder.width, *encoder.grid))
        stated = (config.pixel_mean, config.pixel_std)
        if stated != (mean, std):
            raise IdentityMismatchError(
                f"a decoder must give back its encoder's pixels, of mean {mean} and std {std}; {path} is for "
                f"{config.pixel_mean} and {config.pixel_std}; choose the store it belongs to, or say another "
                "--decoder-output"
            )
    else:
        model = load_decoder(path, pixel_mean=mean, pixel_std=std)
        # Of a bare decoder the width alone: tokens on another grid are resized to its own.
        _require_shape(path, (model.config.token_width,), (encoder.width,))
    return Snapshot(
        model=model.to(device), config=model.config, normalizer=None, meta=_meta(encoder, (), num_classes=0)
    )


def _published_normalizer(path: Path) -> LatentNormalizer:
    if not path.is_dir():
        return load_statistics(path)
    found = read_autoencoder(path).normalizer
    if found is None:
        raise PublishedFileError(
            f"{path} holds no latent statistics; give a stat.pt, or leave --statistics out"
        )
    return found


def _store_normalizer(store: Store) -> LatentNormalizer:
    found = store.statistics()
    return LatentNormalizer(torch.tensor(found.mean), torch.tensor(found.variance))


def _require_shape(path: Location, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise IdentityMismatchError(
            f"a published file must be for the encoder's tokens, [D, h, w] or [D] = {list(wanted)}; {path} is for "
            f"{list(found)}; choose the store it belongs to"
        )


def _meta(encoder: EncoderIdentity, class_names: tuple[str, ...], num_classes: int) -> SnapshotMeta:
    return SnapshotMeta(
        encoder=encoder.to_dict(),
        class_names=class_names,
        num_classes=num_classes,
        grid=encoder.grid,
        width=encoder.width,
        step=None,
        samples_seen=None,
        ema_rate=None,
    )
