"""Which statistics a run normalises its latents by, decided once and kept with the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from shards import Store, UsageError, read_document
from train.models.normalizer import LatentNormalizer
from train.weights.published import load_statistics
from train.weights.tensor_files import open_tensors, require_intact, save_tensors


@dataclass(frozen=True)
class _Header:
    """What the header of a normaliser's file holds, as JSON."""

    eps: float


FILE_NAME = "normalizer.safetensors"


def latent_normalizer(
    store: Store,
    views: tuple[str, ...],
    *,
    published: Path | None,
    inherited: LatentNormalizer | None,
    kept: Path,
) -> LatentNormalizer:
    """Return the normaliser of a run.

    The first of these that there is: the one the run began with, a published file, the one its initial weights were
    trained with, the store's exact statistics of the views used.

    Args:
        store: the store.
        views: views trained on.
        published: a published statistics file (`stat.pt`: var, and perhaps mean).
        inherited: the normaliser of the snapshot the run starts from.
        kept: RUN/normalizer.safetensors.

    Raises:
        UsageError: the statistics are for tokens of another shape than the store's.
    """
    if kept.is_file():
        normalizer = load_normalizer(kept)
    elif published is not None:
        normalizer = load_statistics(published)
    elif inherited is not None:
        normalizer = inherited
    else:
        statistics = store.statistics(views)
        normalizer = LatentNormalizer(torch.tensor(statistics.mean), torch.tensor(statistics.variance))
    shape = (store.width, *store.grid)
    if tuple(normalizer.variance.shape) != shape:
        raise UsageError(
            f"statistics must be of the store's tokens, [D, h, w] = {list(shape)}; "
            f"these are {list(normalizer.variance.shape)}"
        )
    return normalizer


def save_normalizer(path: Path, normalizer: LatentNormalizer) -> None:
    """Keep a normaliser as a file."""
    save_tensors(path, normalizer.state_dict(), {"eps": normalizer.eps}, embed_digest=True)


def load_normalizer(path: Path) -> LatentNormalizer:
    """Read what `save_normalizer` wrote."""
    require_intact(path)
    with open_tensors(path) as (file, header):
        mean = file.get_tensor("mean") if "mean" in file.keys() else None  # noqa: SIM118 - not a dict
        eps = read_document(header, _Header, name=f"the header of {path}").eps
        return LatentNormalizer(mean, file.get_tensor("variance"), eps)
