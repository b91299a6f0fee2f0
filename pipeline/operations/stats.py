"""`pipeline stats`: the exact statistics of a store, shown, written to a file, or compared with one."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import log, show
from pipeline.encode.statistics_file import read_statistics, write_statistics
from pipeline.operations.facts import statistics_facts
from pipeline.settings.operations import StatsConfig
from shards import Statistics, Store, open_store

_WORST_CHANNELS = 5


def stats(config: StatsConfig) -> None:
    """Print the statistics of some views, and write or compare them where that is asked for.

    Raises:
        UserError: If there is no finished store, it lacks a view, or a file is not one of statistics.
    """
    store = open_store(config.store, follow_links=config.follow_links)
    views = tuple(filter(None, config.views.split(","))) or store.views
    exact = store.statistics(views, exact=True)
    facts: dict[str, Any] = {"views": list(views), **statistics_facts(exact)}
    if config.against is not None:
        facts["against"] = {"file": str(config.against), **_compared(config, store, exact)}
    show(json.dumps(facts, indent=1) if config.json else _as_text(facts))
    if config.out is not None:
        write_statistics(exact, config.out)
        log(f"wrote {config.out}")


def _compared(config: StatsConfig, store: Store, exact: Statistics) -> dict[str, Any]:
    """Return how far the store's statistics are from a file's."""
    assert config.against is not None
    file = read_statistics(config.against, (store.width, *store.grid)).statistics
    return {
        # A published file often has no mean, which readers take for zeros.
        "mean": _difference(exact.mean, file.mean) if file.mean.any() else None,
        "variance": _difference(exact.variance, file.variance),
    }


def _difference(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, Any]:
    """Return the differences of two maps [D, h, w]; relative ones are shares of the file's numbers."""
    absolute = np.abs(ours - theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(absolute == 0, 0.0, absolute / np.abs(theirs))
    channels = relative.mean(axis=(1, 2))
    worst = np.argsort(-channels, kind="stable")[:_WORST_CHANNELS]
    return {
        "mean_absolute": float(absolute.mean()),
        "largest_absolute": _place(absolute, ours, theirs),
        "largest_relative": _place(relative, ours, theirs),
        "worst_channels": {int(channel): float(channels[channel]) for channel in worst},
    }


def _place(
    size: NDArray[np.float64], ours: NDArray[np.float64], theirs: NDArray[np.float64]
) -> dict[str, Any]:
    channel, y, x = (int(i) for i in np.unravel_index(int(size.argmax()), size.shape))
    return {
        "difference": float(size[channel, y, x]),
        "channel": channel,
        "y": y,
        "x": x,
        "store": float(ours[channel, y, x]),
        "file": float(theirs[channel, y, x]),
    }


def _as_text(facts: dict[str, Any]) -> str:
    lines = [
        f"views      {', '.join(facts['views'])}: {facts['count']} rows",
        f"mean       {facts['mean']:+.4f}",
        f"variance   {facts['variance']:.4f}, by channel {facts['channel_variance_min']:.4g} to "
        f"{facts['channel_variance_max']:.4g}",
    ]
    against = facts.get("against")
    if against is not None:
        lines.append(f"against    {against['file']}")
        for name in ("mean", "variance"):
            lines += [f"  {name:<8} {line}" for line in _difference_lines(against[name])]
    return "\n".join(lines)


def _difference_lines(difference: dict[str, Any] | None) -> list[str]:
    if difference is None:
        return ["the file has none"]
    worst = ", ".join(f"{channel} {share:.3%}" for channel, share in difference["worst_channels"].items())
    lines = [f"differs by {difference['mean_absolute']:.4g} on average"]
    for kind, form in (("absolute", ".4g"), ("relative", ".3%")):
        most = difference[f"largest_{kind}"]
        lines.append(
            f"differs most, {kind}, by {most['difference']:{form}} in channel {most['channel']} at "
            f"y {most['y']}, x {most['x']}: {most['store']:.4g} here, {most['file']:.4g} in the file"
        )
    return [*lines, f"differs most in the channels {worst} (relative, mean over positions)"]
