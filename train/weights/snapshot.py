"""Snapshots: weights to use, in one safetensors file with everything needed to use them.

A snapshot holds a network's weights (a running average of those trained), its configuration, the normaliser of a DiT,
and where it comes from. `train.engine.checkpoint` holds the state to resume; nothing reads one in place of the other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shards import EncoderIdentity, UsageError, UserError, read_document
from train.models.build import build_model
from train.models.config import ModelConfig, ViTDecoderConfig, config_from_dict, config_to_dict
from train.models.cost import num_parameters
from train.models.flat_config import FlatConfig
from train.models.normalizer import EPS, LatentNormalizer
from train.weights.infer import PublishedFileError
from train.weights.published import require_same_shapes
from train.weights.tensor_files import open_tensors, require_intact, save_tensors

FORMAT = "rae-latents snapshot 1"
_NORMALIZER = "normalizer."
_CHECKPOINT = re.compile(r"step-\d+")
"""Folders that `train.engine.checkpoint` writes."""


@dataclass(frozen=True, kw_only=True)
class SnapshotMeta:
    """Where a snapshot comes from."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    encoder: dict[str, Any]
    """The encoder's identity, as `EncoderIdentity.to_dict` gives it."""
    class_names: tuple[str, ...]
    """Names of the classes, by label; empty where the store has none."""
    num_classes: int
    """Number of classes."""
    grid: tuple[int, int]
    """Token rows and columns."""
    width: int
    """Token width."""
    step: int | None
    """Optimizer steps the weights come from; None, here and below: a published file, which does not say."""
    samples_seen: int | None
    """Samples those steps learnt from."""
    ema_rate: float | None
    """Rate of the running average the weights are; 0: the trained weights themselves."""
    shift_base: int = 4096
    """Numbers in a latent for which a DiT's times were not shifted, which sampling must share; as published."""
    prediction: Literal["velocity", "x"] = "velocity"
    """What a DiT puts out: the velocity, or the data."""
    time_floor: float = 0.0
    """Least time that a DiT's predicted data is divided by to become a velocity."""
    teacher: str | None = None
    """SHA-256 of the snapshot a few-step network was distilled from; None where there was none."""
    dtype: str | None = None
    """Storage type of the tokens it was trained on; None: not known."""
    code: str | None = None
    """Digest of the int8 code of these tokens; None for other storage types."""

    @property
    def encoder_id(self) -> str:
        """Digest of the encoder's identity."""
        return EncoderIdentity.from_dict(self.encoder).id


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a snapshot's header holds, as JSON."""

    format: str
    config: dict[str, Any]
    meta: SnapshotMeta
    eps: float | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot in memory."""

    model: nn.Module
    """The network, in evaluation mode."""
    config: ModelConfig
    """Its shape."""
    normalizer: LatentNormalizer | None
    """Between raw tokens and latents; a decoder has none, it reads raw tokens."""
    meta: SnapshotMeta
    """Where it comes from."""

    @property
    def kind(self) -> Literal["dit", "decoder", "compressor"]:
        """What its network is for."""
        if isinstance(self.config, ViTDecoderConfig):
            return "decoder"
        return "compressor" if isinstance(self.config, FlatConfig) else "dit"


def save_snapshot(
    path: Path,
    weights: dict[str, Tensor],
    *,
    config: ModelConfig,
    normalizer: LatentNormalizer | None,
    meta: SnapshotMeta,
    write: bool = True,
) -> None:
    """Write a snapshot; a reader of `path` sees the old one or the new one.

    Args:
        path: the file.
        weights: the network's state dict, by its published keys.
        config: the network's shape.
        normalizer: of a DiT; None for a decoder.
        meta: where it comes from.
        write: whether this process writes; where weights are sharded the others must help to gather.
    """
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
    statistics = {} if normalizer is None else normalizer.state_dict(prefix=_NORMALIZER)
    header = {
        "format": FORMAT,
        "config": config_to_dict(config),
        "meta": dataclasses.asdict(meta),
        "eps": None if normalizer is None else normalizer.eps,
    }
    save_tensors(path, {**weights, **statistics}, header, write=write, embed_digest=True)


def is_snapshot(path: Path) -> bool:
    """Return whether a file says in its header that it is a snapshot, of this version or another; a folder is none.

    Raises:
        UsageError: it is a checkpoint, or a file of one, from which only its own run goes on.
        UserError: there is nothing there, or an empty file, or it begins as a safetensors file and is not a whole one.
    """
    folder = path if path.is_dir() else path.parent
    if _CHECKPOINT.fullmatch(folder.name) and (folder / "state.json").is_file():
        raise UsageError(
            f"{path} belongs to a checkpoint, from which its own run goes on; give RUN/snapshots/latest.safetensors"
        )
    if path.is_dir():
        return False
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is an empty file; copy it again, or give RUN/snapshots/latest.safetensors")
    with path.open("rb") as start:
        # A safetensors file is the length of its header, 8 bytes, then the header as a JSON object.
        safetensors = start.read(9)[8:] == b"{"
    if not safetensors:
        return False
    with open_tensors(path) as (_, header):
        return "format" in read_document(header, dict[str, Any], name=path)


def load_snapshot(path: Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot.

    Raises:
        UserError: there is no such file, or it is not a snapshot of this version.
    """
    with open_tensors(path, device) as (file, header):
        about = _read_header(header, path)
        require_intact(path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config = config_from_dict(about.config)
    weights = {name: value for name, value in tensors.items() if not name.startswith(_NORMALIZER)}
    _require_fit(config, weights, path)
    with torch.device(device):
        model = build_model(config)
    model.load_state_dict(weights)
    normalizer = None
    if f"{_NORMALIZER}variance" in tensors:
        mean = tensors.get(f"{_NORMALIZER}mean")
        eps = EPS if about.eps is None else about.eps
        normalizer = LatentNormalizer(mean, tensors[f"{_NORMALIZER}variance"], eps).to(device)
    return Snapshot(model=model.eval(), config=config, normalizer=normalizer, meta=about.meta)


def verify_snapshot(path: Path) -> bool:
    """Check a snapshot's header and digest without building its network.

    Returns:
        Whether it holds a digest; one that was written before digests were kept does not.

    Raises:
        UserError: it is damaged, or not a snapshot of this version.
    """
    with open_tensors(path) as (_, header):
        config_from_dict(_read_header(header, path).config)
    return require_intact(path)


def _read_header(header: str, path: Path) -> _Header:
    said = read_document(header, dict[str, Any], name=path).get("format")
    if said != FORMAT:
        raise UserError(
            f"{path} is not a snapshot: its header says format {said!r}, not {FORMAT!r}; "
            "give RUN/snapshots/latest.safetensors of a training run"
        )
    return read_document(header, _Header, name=f"the header of {path}")


def _require_fit(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse weights of another network than the configuration describes, before that is built."""
    deepest = max(_depths(config_to_dict(config)))
    if deepest > len(weights):
        raise PublishedFileError(
            f"{path} describes a network of {deepest} blocks and holds {len(weights)} tensors"
        )
    numbers = sum(tensor.numel() for tensor in weights.values())
    if (parameters := num_parameters(config)) > numbers:
        raise PublishedFileError(
            f"{path} describes a network of {parameters} parameters and holds {numbers} numbers"
        )
    with torch.device("meta"):  # shapes without memory
        network = build_model(config)
    require_same_shapes(network, weights, path)


def _depths(values: dict[str, Any]) -> Iterator[int]:
    """Yield every number of blocks in a configuration."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _depths(value)
        elif name.endswith("depth") and value is not None:
            yield value
