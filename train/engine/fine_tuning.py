"""A network at the start of a run: on its device, with the weights of a snapshot or published file if one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards import UsageError, read_document
from train.distributed import Team
from train.engine.checkpoint import newest_of_all
from train.models.build import Generator
from train.models.config import ViTDecoderConfig
from train.models.flat import FlatVAE
from train.models.normalizer import LatentNormalizer
from train.models.vit_decoder import ViTDecoder
from train.settings.config import Prediction, Settings
from train.weights.published import differences, load_decoder, read_state_dict
from train.weights.snapshot import Snapshot, load_snapshot
from train.weights.tensor_files import open_tensors

LABEL_TABLES = ("y_embedder.embedding_table.weight", "ctx_embedder.embedding_table.weight")
END_TIME = "r_embedder."
ALIGNMENT = "alignment."


def prepare_network(
    model: Generator | ViTDecoder | FlatVAE,
    settings: Settings,
    team: Team,
    *,
    start: Path | None,
    prediction: Prediction | None = None,
) -> LatentNormalizer | None:
    """Give a fresh network its initial weights, and set it up on the process's device as the settings ask.

    Args:
        model: the fresh network.
        settings: the run's; those of activation checkpointing and compilation are used.
        team: the processes; every one must call this.
        start: weights to begin with, as `start_from` takes them; None, or a run that has a checkpoint: none.
        prediction: see `start_from`.

    Returns:
        The normaliser the weights were trained with, if the file holds one.
    """
    assert settings.out is not None
    normalizer = None
    if start is not None and newest_of_all(settings.out / "checkpoints", team) is None:
        normalizer = start_from(model, start, prediction)
    model.recompute_activations = settings.activation_checkpointing
    model.to(team.device)
    if settings.compile:
        model.compile()
    return normalizer


def start_from(model: nn.Module, path: Path, prediction: Prediction | None = None) -> LatentNormalizer | None:
    """Copy weights into a fresh model of the same shape.

    With another number of classes the label table is not copied, except for its last row, which means no class. A model
    that takes the end time of a jump, or is aligned, keeps its own weights for it where the file has none of them.

    Args:
        model: the fresh model.
        path: a snapshot of ours, or a published file.
        prediction: what a diffusion transformer will put out; None: it is none, or it is not compared.

    Returns:
        The normaliser the weights were trained with, if the file holds one.

    Raises:
        UserError: the file is missing, broken, or holds another network or one that puts out something else.
    """
    weights, normalizer = _read(model, path, prediction)
    own = model.state_dict()
    for part in (END_TIME, ALIGNMENT):
        if not any(name.startswith(part) for name in weights):
            weights.update({name: value for name, value in own.items() if name.startswith(part)})
    for name in LABEL_TABLES:
        if name in own and name in weights:
            table, theirs = own[name], weights[name]
            if len(table) != len(theirs) and table.shape[1:] == theirs.shape[1:]:
                weights[name] = torch.cat([table[:-1], theirs[-1:]])
    found = differences(model, weights)
    if found:
        raise UsageError(
            f"{path} holds another network than the settings describe; {found}; choose the preset it was trained with"
        )
    model.load_state_dict(weights)
    return normalizer


def _require_same_output(
    model: nn.Module, snapshot: Snapshot, path: Path, prediction: Prediction | None
) -> None:
    """Refuse weights whose last layer puts out something else than the settings ask for."""
    if prediction is not None and snapshot.kind == "dit" and snapshot.meta.prediction != prediction:
        raise UsageError(
            f"{path} puts out {snapshot.meta.prediction} and the settings ask for {prediction}; give "
            f"--flow.prediction {snapshot.meta.prediction}"
        )
    if not (isinstance(model, ViTDecoder) and isinstance(snapshot.config, ViTDecoderConfig)):
        return
    own, theirs = ((config.pixel_mean, config.pixel_std) for config in (model.config, snapshot.config))
    if own != theirs:
        raise UsageError(
            f"{path} puts out pixels of mean {theirs[0]} and std {theirs[1]}, the settings ask for {own[0]} and "
            f"{own[1]}; choose its preset, or --model.output {snapshot.config.output}"
        )


def _read(
    model: nn.Module, path: Path, prediction: Prediction | None
) -> tuple[dict[str, Tensor], LatentNormalizer | None]:
    if path.suffix == ".safetensors":
        with open_tensors(path) as (_, header):
            ours = "config" in read_document(header, dict[str, Any], name=path)
        if ours:
            snapshot = load_snapshot(path)
            _require_same_output(model, snapshot, path, prediction)
            return dict(snapshot.model.state_dict()), snapshot.normalizer
    if isinstance(model, ViTDecoder):
        return dict(load_decoder(path, model.config).state_dict()), None
    return read_state_dict(path), None
