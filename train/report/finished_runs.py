"""Reading back what runs wrote, finished or not: settings, metrics, samples, and the scores that eval gave them."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards import UserError, read_document
from train.report.metrics_file import read_metrics
from train.settings.saved_settings import ORIGIN, flat_values, load_settings

_SHEET = re.compile(r"step-(\d{1,18})\.png", re.ASCII)
TRAINING_PASSES = 3
"""FLOPs of a training step in forward passes: one forward, two backward."""


@dataclass(frozen=True, kw_only=True)
class _SnapshotHeader:
    config: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as its folder shows it.

    Attributes:
        path: Its folder.
        name: What the page calls it; unique among the runs compared.
        settings: Resolved settings by dotted name.
        varies: The config.json whose settings it was begun with, where it was.
        varies_in: What was changed of these settings, each as "NAME: BEFORE → NOW".
        metrics: Lines of metrics.jsonl.
        samples: Sheets of samples by step.
        flops: FLOPs of a training step for one sample; None where no snapshot tells the network.
        scores: By the name of a results.json's folder, its metrics.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    varies: str | None
    varies_in: tuple[str, ...]
    metrics: list[dict[str, Any]]
    samples: dict[int, Path]
    flops: float | None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps logged so far."""
        return max((line["step"] for line in self.metrics), default=0)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Return the step and value of a metric, wherever it was logged."""
        return [(line["step"], line[metric]) for line in self.metrics if line.get(metric) is not None]

    def progress(self) -> list[tuple[int, float, float, float]]:
        """Return step, images, hours of training and FLOPs at each line that training logged."""
        rows, hours, before = [], 0.0, 0
        for line in self.metrics:
            if "step_seconds" not in line:
                continue
            hours += (line["step"] - before) * line["step_seconds"] / 3600
            before = line["step"]
            images = float(line["samples_seen"])
            rows.append((line["step"], images, hours, images * (self.flops or 0.0)))
        return rows


def read_run(path: Path, name: str) -> Run:
    """Read a run's folder, which may be written to meanwhile.

    Raises:
        UserError: It holds no run, or one that cannot be read; the message says which file.
    """
    settings = load_settings(path / "config.json")
    return Run(
        path=path,
        name=name,
        settings={key: value for key, value in flat_values(settings).items() if key not in ORIGIN},
        varies=settings.varies,
        varies_in=settings.varies_in,
        metrics=read_metrics(path / "metrics.jsonl"),
        samples=sample_sheets(path),
        flops=_step_flops(path),
    )


def sample_sheets(path: Path) -> dict[int, Path]:
    """Return the sheets of samples in a run's folder by step, ascending; other files there are passed over."""
    found = {}
    for sheet in (path / "samples").glob("step-*.png"):
        if (name := _SHEET.fullmatch(sheet.name)) and sheet.is_file() and not sheet.is_symlink():
            found[int(name[1])] = sheet
    return dict(sorted(found.items()))


def _step_flops(path: Path) -> float | None:
    """Return the FLOPs of a training step for one sample, by the network that the newest snapshot holds."""
    from train.models.config import config_from_dict
    from train.models.cost import forward_flops
    from train.weights.tensor_files import open_tensors

    latest = path / "snapshots" / "latest.safetensors"
    if not latest.is_file():
        return None
    with open_tensors(latest) as (_, header):
        about = read_document(header, _SnapshotHeader, name=f"the header of {latest}")
        return float(TRAINING_PASSES * forward_flops(config_from_dict(about.config)))


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read runs; those that cannot be read are reported and left out.

    Args:
        paths: Their folders, or folders of such folders.

    Returns:
        The runs, and by folder why one could not be read.
    """
    runs, unreadable = [], {}
    paths = list(dict.fromkeys(run for path in paths for run in _runs_in(path)))
    for path, name in zip(paths, _short_names(paths), strict=True):
        try:
            runs.append(read_run(path, name))
        except (UserError, OSError) as error:
            unreadable[path] = str(error)
    return runs, unreadable


def _runs_in(path: Path) -> list[Path]:
    """Return the folder itself, or, if it holds no run, those in it that do."""
    if not (path / "config.json").exists():
        inside = [config.parent for config in path.glob("*/config.json")]
        return sorted(inside, key=lambda run: _by_number(run.name)) or [path]
    return [path]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that puts seed-10 behind seed-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_families(runs: Sequence[Run]) -> list[tuple[Run, Run | None, int]]:
    """Return each run behind the one that it varies, with that one, if it is there, and how many are above it."""
    parent = {run.name: _parent(run, runs) for run in runs}

    def behind(above: Run | None, depth: int) -> Iterator[tuple[Run, Run | None, int]]:
        for run in runs:
            if parent[run.name] is above:
                yield run, above, depth
                yield from behind(run, depth + 1)

    found = list(behind(None, 0))
    # Runs that vary each other in a ring, as copied folders may, have nobody above them.
    placed = {run.name for run, _, _ in found}
    return found + [(run, parent[run.name], 0) for run in runs if run.name not in placed]


def _parent(run: Run, runs: Sequence[Run]) -> Run | None:
    """Find the run whose config.json a run was begun from: the one at that place, or else the only one of that name."""
    if run.varies is None:
        return None
    folder = Path(run.varies).parent
    others = [other for other in runs if other is not run]
    there = [other for other in others if other.path.absolute() == folder.absolute()]
    named = [other for other in others if other.path.absolute().parts[-2:] == folder.absolute().parts[-2:]]
    return next(iter(there), named[0] if len(named) == 1 else None)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the ends of some paths that tell them apart."""
    depth = 1
    absolute = [path.absolute() for path in paths]
    while True:
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(set(absolute)) or depth > max(len(path.parts) for path in absolute):
            return names
        depth += 1


def add_scores(runs: Iterable[Run], results: Iterable[Path]) -> list[str]:
    """Give each run the metrics of the results.json files that are about its snapshots.

    A file below a run's folder is about that run; another one is matched by the digest of the snapshot it names.

    Args:
        runs: The runs, whose `scores` are filled.
        results: Further results.json files, or folders that hold one.

    Returns:
        A line for each file that is about none of the runs, or cannot be read.
    """
    runs = list(runs)
    problems = []
    for run in runs:
        for path in sorted(run.path.glob("**/results.json")):
            problems += _add(run, path)
    digests: dict[str, Run] | None = None
    for given in results:
        path = given / "results.json" if given.is_dir() else given
        try:
            digest = _read_results(path).get("snapshot_sha256")
        except (UserError, OSError) as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        if digests is None:
            digests = {_digest(p): run for run in runs for p in _snapshots(run.path)}
        if isinstance(digest, str) and digest in digests:
            problems += _add(digests[digest], path)
        else:
            problems.append(f"{path} is about a snapshot of none of these runs")
    return problems


def _add(run: Run, path: Path) -> list[str]:
    try:
        content = _read_results(path)
    except (UserError, OSError) as error:
        return [f"{path} holds no metrics: {error}"]
    metrics = content.get("metrics", content)
    if not isinstance(metrics, dict):
        return [f"{path} holds no metrics, but {metrics!s:.40}"]
    run.scores[path.parent.name] = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and abs(value) <= sys.float_info.max
    }
    return []


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    return read_document(path.read_bytes(), dict[str, Any], name=path)


def _snapshots(path: Path) -> list[Path]:
    return [found for found in (path / "snapshots").glob("*.safetensors") if found.is_file()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that are not the same in all runs, in the order of the settings."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
