"""`pipeline merge`: the rows of several stores of one encoder in one store, classes united by name."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.console import named
from pipeline.operations.copying import copy
from pipeline.settings.operations import MergeConfig
from pipeline.sources.labels import answers_of
from shards import IdentityMismatchError, Store, UsageError, open_store
from shards.writing.copying import copied_recipe
from shards.writing.selection import Part, reshuffled

_SHARED = ("dtype", "views", "image_size", "precision", "class_token")
"""Settings that all stores must have in common, beside the encoder."""


def merge(config: MergeConfig) -> None:
    """Copies the rows of all stores into one.

    Raises:
        UserError: If they are not of one encoder and kind, or share keys.
    """
    if len(config.stores) < 2:
        raise UsageError(f"merge needs at least two stores, got {len(config.stores)}")
    stores = [open_store(path) for path in config.stores]
    for store in stores[1:]:
        _require_alike(stores[0], store, recode=config.recode)
    _require_different_keys(stores)
    class_names, labels = united_classes(stores)
    parts = [
        Part(store, np.arange(store.plan.num_images), own) for store, own in zip(stores, labels, strict=True)
    ]
    first = stores[0]
    together = sum(store.recipe.num_shards for store in stores)
    shards = together if config.shards is None else config.shards
    selection = reshuffled(parts, class_names, shards, first.recipe.seed)
    copy(selection, copied_recipe(selection), config.out, command="merge", code=first.code)


def united_classes(stores: Sequence[Store]) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """The classes of all stores: the first's with their ids, then those that others add, in their order.

    Returns:
        The names, and for each store the new label of each of its old ones.

    Raises:
        UsageError: If a store has labels without names or two classes of one name, or names another's class
            differently.
    """
    ids: dict[str, int] = {}
    labels = []
    for store in stores:
        twice = [name for name, count in Counter(store.class_names).items() if count > 1]
        if twice:
            raise UsageError(
                f"class names must differ to be united, {store.path} has {named(twice)} more than once"
            )
        nameless = sorted({str(label) for label in store.plan.labels.tolist() if label >= store.num_classes})
        if nameless:
            raise UsageError(
                f"classes are united by name, and {store.path} has no names for its labels {named(nameless)}; "
                "encode it with --labels"
            )
        labels.append(np.array([ids.setdefault(name, len(ids)) for name in store.class_names], np.int64))
    clashing = [sorted(names) for names in _by_answer(ids).values() if len(names) > 1]
    if clashing:
        raise UsageError(
            f"merged stores must name a class alike, {len(clashing)} have two names: "
            f"{named([' and '.join(names) for names in clashing])}; encode one of the stores with --labels of the other"
        )
    return tuple(ids), labels


def _by_answer(class_names: Iterable[str]) -> dict[str, set[str]]:
    """The class names by each name they answer to."""
    found: dict[str, set[str]] = {}
    for name in class_names:
        for answer in answers_of(name):
            found.setdefault(answer, set()).add(name)
    return found


def _require_alike(first: Store, other: Store, *, recode: bool) -> None:
    first.recipe.encoder.require_same(other.recipe.encoder, what=str(other.path))
    differences = [
        f"{name} is {getattr(first.recipe, name)!r}, in {other.path} {getattr(other.recipe, name)!r}"
        for name in _SHARED
        if getattr(first.recipe, name) != getattr(other.recipe, name)
    ]
    if differences:
        raise IdentityMismatchError(
            f"merged stores must be of one kind: {'; '.join(differences)}; convert or encode one of them like the other"
        )
    if first.recipe.code != other.recipe.code and not recode:
        raise IdentityMismatchError(
            f"{first.path} and {other.path} hold int8 tokens of different codes; add --recode to code those of the "
            "latter anew, with more loss, or merge the stores both were made from"
        )


def _require_different_keys(stores: Sequence[Store]) -> None:
    seen = Counter(key for store in stores for key in store.plan.keys)
    twice = sorted(key for key, count in seen.items() if count > 1)
    if twice:
        raise UsageError(
            f"the keys of merged stores must differ, {len(twice)} come twice: {named(twice)}; make a `pipeline subset` "
            "without them of one of the stores"
        )
