"""Names of classes: what a class answers to, and the classes of several stores united by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.errors import UsageError

_SHORT_NAME = re.compile(r"^(n\d{8}|\d+)[\s,]+\S")
_NAMED_AT_MOST = 10


def answers_of(name: str) -> set[str]:
    """Return the names that select a class: its full name, and the WordNet id, number or part before a tab in front."""
    match = _SHORT_NAME.match(name)
    return {name, match.group(1) if match else name.partition("\t")[0]}


def united_classes(
    stores: Iterable[tuple[str, Sequence[str], NDArray[np.int32]]],
) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Return the classes of all stores: the first's with their ids, then those that others add, in their order.

    Args:
        stores: Of each store, where it is, the names of its classes, and its labels, -1 for none.

    Returns:
        The names, and for each store the new label of each of its old ones.

    Raises:
        UsageError: If a store has labels without names or two classes of one name, or names another's class
            differently.
    """
    ids: dict[str, int] = {}
    new_labels = []
    for path, class_names, labels in stores:
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        if twice:
            raise UsageError(
                f"class names must differ to be united, {path} has {_some(twice)} more than once"
            )
        nameless = [str(label) for label in np.unique(labels[labels >= len(class_names)]).tolist()]
        if nameless:
            raise UsageError(
                f"classes are united by name, and {path} has no names for its labels {_some(nameless)}; "
                "encode it with --labels"
            )
        new_labels.append(np.array([ids.setdefault(name, len(ids)) for name in class_names], np.int64))
    clashing = [sorted(names) for names in _by_answer(ids).values() if len(names) > 1]
    if clashing:
        raise UsageError(
            f"stores must name a class alike to be united, {len(clashing)} have two names: "
            f"{_some([' and '.join(names) for names in clashing])}; encode one of the stores with --labels of the other"
        )
    return tuple(ids), new_labels


def _by_answer(class_names: Iterable[str]) -> dict[str, set[str]]:
    """Return the class names by each name they answer to."""
    found: dict[str, set[str]] = {}
    for name in class_names:
        for answer in answers_of(name):
            found.setdefault(answer, set()).add(name)
    return found


def _some(names: Collection[str]) -> str:
    some = ", ".join(repr(name) for name in list(names)[:_NAMED_AT_MOST])
    return some if len(names) <= _NAMED_AT_MOST else f"{some} and {len(names) - _NAMED_AT_MOST} more"
