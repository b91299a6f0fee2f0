"""The part of a store's page that shows what limited its encode, from the log beside the store."""

import json
from pathlib import Path

from pipeline.encode.limits import STAGES, Limits
from pipeline.operations.page import axes_of, chart
from shards import Location, beside


def limits_section(store: Location) -> str:
    """Return images a second that each stage could reach, over the time of the encode; empty where there is no log."""
    log = beside(store, f"{store.name}.logs") / "progress.jsonl"
    told = _told(log) if log.is_file() else []
    if not told:
        return ""
    figure, axes = axes_of(3.0)
    begun = told[0][0]
    for stage in STAGES:
        points = [(time - begun, rates[stage]) for time, rates in told if stage in rates]
        if points:
            axes.plot(*zip(*points, strict=True), label=stage, marker="." if len(points) < 60 else None)
    axes.set(xlabel="seconds since the first line of the log", ylabel="images a second", yscale="log")
    axes.legend(frameon=False)
    limits = [Limits(rates).limit for _, rates in told]
    shares = ", ".join(
        f"{stage} {limits.count(stage) / len(limits):.0%}" for stage in STAGES if stage in limits
    )
    note = f"<p>By time: {shares}. The lines are what each stage could have reached by itself.</p>"
    return "<h2>What limited the encode</h2>" + note + chart(figure, "rate that each stage could reach")


def _told(log: Path) -> list[tuple[float, dict[str, float]]]:
    """Return time and rates of each line of a progress log that has limits; a line cut off by a kill is left out."""
    told = []
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if '"Limits"' not in line:
                continue
            try:
                values = json.loads(line)
                rates = {
                    stage: float(rate) for stage, rate in values["images_per_second"].items() if rate > 0
                }
                told.append((float(values["time"]), rates))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
    return told
