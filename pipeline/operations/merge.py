"""`pipeline merge`: the rows of several stores of one encoder in one store, classes united by name."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.console import named
from pipeline.operations.copying import copy
from pipeline.settings.operations import MergeConfig
from shards import IdentityMismatchError, Store, UsageError, open_store, united_classes
from shards.writing.copying import copied_recipe
from shards.writing.selection import Part, reshuffled

_SHARED = ("dtype", "views", "image_size", "precision", "class_token")
"""Settings that all stores must have in common, beside the encoder."""


def merge(config: MergeConfig) -> None:
    """Copy the rows of all stores into one.

    Raises:
        UserError: If they are not of one encoder and kind, or share keys.
    """
    if len(config.stores) < 2:
        raise UsageError(f"merge needs at least two stores, got {len(config.stores)}")
    stores = [open_store(path, follow_links=config.follow_links) for path in config.stores]
    for store in stores[1:]:
        _require_alike(stores[0], store, recode=config.recode)
    _require_different_keys(stores)
    if not config.same_numbers:
        _require_no_shared_numbers(stores)
    class_names, labels = united_classes(
        (str(store.path), store.class_names, store.plan.labels) for store in stores
    )
    parts = [
        Part(store, np.arange(store.plan.num_images), own) for store, own in zip(stores, labels, strict=True)
    ]
    first = stores[0]
    together = sum(store.recipe.num_shards for store in stores)
    shards = together if config.shards is None else config.shards
    selection = reshuffled(parts, class_names, shards, first.recipe.seed)
    copy(selection, copied_recipe(selection), config.out, command="merge", code=first.code)


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
            "latter again, with more loss, or merge the stores both were made from"
        )


def _require_no_shared_numbers(stores: Sequence[Store]) -> None:
    """Refuse classes that are numbers in several stores: class 3 of one set is seldom class 3 of another."""
    seen = Counter(name for store in stores for name in store.class_names if name.isdecimal())
    shared = sorted((name for name, count in seen.items() if count > 1), key=int)
    if shared:
        raise UsageError(
            f"classes are united by name, and {len(shared)} are numbers in several of these stores: {named(shared)}; "
            "add --same-numbers if they mean the same in all, or encode the stores with --labels that name them"
        )


def _require_different_keys(stores: Sequence[Store]) -> None:
    seen = Counter(key for store in stores for key in store.plan.keys)
    twice = sorted(key for key, count in seen.items() if count > 1)
    if twice:
        raise UsageError(
            f"the keys of merged stores must differ, {len(twice)} come twice: {named(twice)}; make a `pipeline subset` "
            "without them of one of the stores"
        )
