"""What is known of a store before it is finished: from its plan and the commit records that are there."""

from collections import Counter
from typing import Any

from pipeline.encode.claims import Failures
from shards import StoreWriter, bad_rows, given_source
from shards.writing.finalize import Commits, found_commits


def unfinished_facts(writer: StoreWriter) -> dict[str, Any]:
    """Return shards (of each view and of all), rows, sizes, failures and unusable images so far, as JSON values."""
    recipe, plan = writer.recipe, writer.plan
    commits = found_commits(writer.path, recipe)
    pending = writer.pending()
    reasons = bad_rows(recipe, plan, commits)
    key_of = dict(zip(plan.rows.tolist(), plan.keys, strict=True)) if reasons else {}
    sizes: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for (view, _), record in commits.items():
        rows[view] += record.num_rows
        for listed in record.objects:
            sizes[_field_of(listed.path)] += listed.nbytes
    return {
        "revision": writer.revision,
        "images": plan.num_images,
        "classes": len(plan.class_names),
        "shards_done": len(recipe.views) * recipe.num_shards - len(pending),
        "shards_pending": len(pending),
        "failed_shards": Failures(writer.path, max_attempts=1).parked(),
        "rows_by_view": {view: rows[view] for view in recipe.views},
        "unusable": len(reasons),
        "unusable_images": [{"key": key_of[row], "reason": reason} for row, reason in reasons.items()],
        "bytes": sizes.total(),
        "bytes_by_part": dict(sizes),
        "statistics_from_file": given_source(writer.path),
        "rows_a_second": rate_history(commits, recipe.views),
    }


def rate_history(commits: Commits, views: tuple[str, ...]) -> dict[str, list[float]]:
    """Return rows a second of each view's shards, in order of shard."""
    history: dict[str, list[float]] = {view: [] for view in views}
    for (view, _), record in sorted(commits.items()):
        history[view].append(round(record.num_rows / max(record.seconds, 1e-3), 1))
    return history


def _field_of(path: str) -> str:
    """Return the part of the store that a shard's object is counted under."""
    return "/".join(path.split("/")[:2])
