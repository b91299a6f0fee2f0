"""`pipeline subset`: some rows of a store, by class, by key, every n-th, or a seeded sample."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.console import named
from pipeline.operations.copying import copy
from pipeline.settings.operations import SubsetConfig
from pipeline.sources.labels import LabelTable
from shards import Plan, Store, UsageError, open_store, permutation, printable_text
from shards.writing.copying import copied_recipe
from shards.writing.selection import Part, reshuffled

_LINES_OF_A_KEY = 16


def subset(config: SubsetConfig) -> None:
    """Copy the selected rows.

    Raises:
        UserError: If nothing was asked for, a class or key is unknown, or no image is left.
    """
    store = open_store(config.store, follow_links=config.follow_links)
    images = chosen_images(config, store.plan)
    shards = -(-len(images) // store.capacity) if config.shards is None else config.shards
    labels, class_names = _classes_left(store, images) if config.relabel else (None, store.class_names)
    selection = reshuffled([Part(store, images, labels)], class_names, shards, store.recipe.seed)
    copy(selection, copied_recipe(selection), config.out, command="subset", code=store.code)


def chosen_images(config: SubsetConfig, plan: Plan) -> NDArray[np.int64]:
    """Return the selected images' indices in the plan, in order of key, int64[k].

    Raises:
        UsageError: If nothing was asked for, a class or key is unknown, or no image is left.
    """
    if not config.classes and all(asked is None for asked in (config.keys, config.every, config.sample)):
        raise UsageError("subset needs at least one of --classes, --keys, --every and --sample; got none")
    wanted = np.ones(plan.num_images, np.bool_)
    if config.classes:
        wanted &= np.isin(plan.labels, _labels_of(config.classes, plan))
    if config.keys is not None:
        wanted &= np.isin(plan.keys.astype(str), _keys_in(config.keys, plan))
    images = np.flatnonzero(wanted)
    images = images[np.argsort(plan.keys[images], kind="stable")]
    if config.every is not None:
        if config.every < 1:
            raise UsageError(f"--every must be at least 1, got {config.every}")
        images = images[:: config.every]
    if config.sample is not None:
        if not 1 <= config.sample <= len(images):
            raise UsageError(
                f"--sample must be between 1 and the {len(images)} images left, got {config.sample}"
            )
        drawn = permutation(len(images), seed=config.seed, stream="subset")[: config.sample]
        images = images[np.sort(drawn)]
    if not len(images):
        raise UsageError("no image is left of what subset was asked for; ask for more classes or keys")
    return images.astype(np.int64)


def _labels_of(classes: Collection[str], plan: Plan) -> list[int]:
    table = LabelTable.of_names(plan.class_names)
    ids = {name: table.id_of(name) for name in classes}
    unknown = [name for name in classes if ids[name] is None]
    if unknown:
        raise UsageError(
            f"--classes must be classes of the store, {named(unknown)} are not; `pipeline inspect` lists them"
        )
    return [label for label in ids.values() if label is not None]


def _keys_in(file: Path, plan: Plan) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--keys must be a text file with a key a line, got {file}: {error}") from error
    keys, unknown = named_keys(text, set(plan.keys))
    if unknown:
        raise UsageError(
            f"--keys {file} must hold keys of the store, {named(unknown)} are not; leave them out"
        )
    return keys


def named_keys(text: str, known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the keys that a text names, a line each, and the lines that are none.

    A key may be written as commands print it, with escapes for what cannot be seen; one with line feeds also as it is,
    over several lines. Nothing but line feeds ends a line.
    """
    lines = [line for line in text.split("\n") if line]
    keys: list[str] = []
    unknown: list[str] = []
    by_print = {printable_text(key): key for key in known} if any("\\" in line for line in lines) else {}
    place = 0
    while place < len(lines):
        line = lines[place]
        spellings = (line, line.removesuffix("\r"), by_print.get(line.removesuffix("\r"), line))
        found = next((key for key in spellings if key in known), None)
        taken = 1
        if found is None:
            found, taken = next(
                (
                    (joined, count)
                    for count in range(2, min(_LINES_OF_A_KEY, len(lines) - place) + 1)
                    if (joined := "\n".join(lines[place : place + count])) in known
                ),
                (None, 1),
            )
        if found is None:
            unknown.append(line)
        else:
            keys.append(found)
        place += taken
    return keys, sorted(set(unknown))


def _classes_left(store: Store, images: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the new label of each old one, and the names of the classes that still have images."""
    left = np.unique(store.plan.labels[images])
    left = left[left >= 0]
    labels = np.full(store.num_classes, -1)
    labels[left] = np.arange(len(left))
    return labels, tuple(store.class_name(label) for label in left.tolist())
