"""Which blocks of an encoder make its tokens, and how they are combined."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.settings.layers import check_ascending
from shards import UsageError

MEAN, WITH_SPATIAL_MEAN = "mean", "mean+spatial-mean"
COMBINATIONS = (MEAN, WITH_SPATIAL_MEAN)


@dataclass(frozen=True)
class Aggregation:
    """Tokens as the mean of several blocks' normalised outputs.

    Attributes:
        layers: Blocks, counted from 0, ascending.
        combination: `mean`, or `mean+spatial-mean`, which adds the spatial mean of the highest block's normalised
            patch tokens to every token.

    Source:
        RAEv2, arXiv 2605.18324, and github:nanovisionx/RAEv2 at 8a0d238, where what the text calls a sum is a mean.
    """

    layers: tuple[int, ...]
    combination: str = MEAN

    @property
    def highest(self) -> int:
        """The last block that is needed."""
        return self.layers[-1]

    def identity(self, depth: int) -> dict[str, Any] | None:
        """Convert to plain JSON values; None for the last block alone, the default."""
        if self == Aggregation((depth - 1,)):
            return None
        return {"layers": list(self.layers), "combination": self.combination}


def combine(aggregations: Sequence[Aggregation], normalised: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """Return the tokens of several aggregations from one pass over the blocks.

    Args:
        aggregations: What is wanted.
        normalised: Blocks in ascending order with their patch tokens after the last LayerNorm, float [B, N, D].

    Returns:
        float [B, N, D] for each of `aggregations`.
    """
    sums: list[Tensor | None] = [None] * len(aggregations)
    for layer, tokens in normalised:
        for index, aggregation in enumerate(aggregations):
            if layer not in aggregation.layers:
                continue
            before = sums[index]
            total = tokens if before is None else before + tokens
            if layer == aggregation.highest:
                total = total / len(aggregation.layers)
                if aggregation.combination == WITH_SPATIAL_MEAN:
                    total = total + tokens.mean(dim=1, keepdim=True)
            sums[index] = total
    return [total for total in sums if total is not None]


def check_within(layers: Sequence[int], depth: int, option: str, name: str) -> None:
    """Refuse blocks that a network does not have.

    Raises:
        UsageError: Naming the largest there is.
    """
    if layers[-1] >= depth:
        raise UsageError(
            f"{option} must be within the {depth} blocks of {name}, 0 to {depth - 1}, got {layers[-1]}; "
            f"the last block is {depth - 1}"
        )


def choose_aggregation(
    depth: int,
    network: str,
    layers: Sequence[int] | None,
    combination: str | None,
    *,
    option: str,
    spatial_mean: bool,
) -> Aggregation:
    """Return the aggregation that settings ask for.

    Args:
        depth: Its number of blocks.
        network: What to call it in a message.
        layers: Blocks, counted from 0, ascending; None takes the last.
        combination: One of `COMBINATIONS`; None takes the family's for several blocks, and `mean` for one.
        option: What names the blocks, for messages.
        spatial_mean: Whether the family adds the spatial mean unless asked otherwise.

    Raises:
        UsageError: If there are no such blocks, or no such combination.
    """
    if combination is not None and combination not in COMBINATIONS:
        raise UsageError(f"--combination must be one of {', '.join(COMBINATIONS)}, got {combination}")
    chosen = (depth - 1,) if layers is None else tuple(layers)
    check_ascending(chosen, option, ",".join(map(str, chosen)))
    check_within(chosen, depth, option, network)
    if combination is None:
        combination = WITH_SPATIAL_MEAN if spatial_mean and len(chosen) > 1 else MEAN
    return Aggregation(chosen, combination)
