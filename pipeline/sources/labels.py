"""Class ids that stay the same from one source to the next."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shards import UsageError, answers_of, read_document

_LARGEST_LABEL = 100_000


@dataclass(frozen=True)
class LabelTable:
    """Names of the classes by id, and the id of each name a source may use.

    Attributes:
        class_names: Full name of each class, such as `n01440764 tench, Tinca tinca`.
        ids: Label of each name that a source may use: the full name, or the short one at its beginning if no other
            class answers to that.
    """

    class_names: tuple[str, ...]
    ids: dict[str, int]

    @classmethod
    def of_names(cls, class_names: Sequence[str]) -> Self:
        """Return the table of these names in this order.

        A name that begins with a WordNet id or a number also answers to that, one with a tab to the part before it.
        What several begin with, such as the year in `2012 Audi A5` and `2012 BMW M3`, none of them answers to.

        Raises:
            UsageError: If two classes have one name.
        """
        full = _ids((name, label) for label, name in enumerate(class_names))
        short: defaultdict[str, list[int]] = defaultdict(list)
        for name, label in full.items():
            for answer in answers_of(name) - {name}:
                short[answer].append(label)
        ids = {answer: labels[0] for answer, labels in short.items() if len(labels) == 1} | full
        _require_composed_apart(full)
        return cls(tuple(class_names), {composed(answer): label for answer, label in ids.items()} | ids)

    @classmethod
    def of_source(cls, names: Iterable[str]) -> Self:
        """Return the table of a source's class names: numbers stay as they are, others are sorted and numbered."""
        distinct = set(names)
        if distinct and all(name.isascii() and name.isdigit() for name in distinct):
            largest = max(int(name) for name in distinct)
            if largest < _LARGEST_LABEL and all(str(int(name)) == name for name in distinct):
                return cls.of_names([str(number) for number in range(largest + 1)])
            return cls.of_names(sorted(distinct, key=lambda name: (int(name), name)))
        return cls.of_names(sorted(distinct))

    def id_of(self, name: str) -> int | None:
        """Return the label of a class that a source names; however its accents are composed. None if there is none."""
        label = self.ids.get(name)
        return self.ids.get(composed(name)) if label is None else label

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table from a store, a JSON list, or a text file with one class a line (line number = label).

        Raises:
            UsageError: If it is none of them, names no class, or is a file in which two classes answer to one name.
        """
        if path.is_dir():
            from shards import Plan
            from shards.metadata.layout import plan_path
            from shards.metadata.root import read_recipe
            from shards.writing.revisions import newest_revision

            if not (path / "plan.parquet").is_file():
                raise UsageError(
                    f"--labels must be a file or a store, got {path}: a folder without plan.parquet"
                )
            recipe = read_recipe(path, newest_revision(path))
            names: list[str] = list(Plan.read(path / plan_path(recipe)).class_names)
        elif not path.is_file():
            raise UsageError(f"--labels must be a file or a store, got {path}: no such file")
        elif path.suffix == ".json":
            names = read_document(
                _text_of(path),
                list[str],
                name=f"--labels {path}",
                error=UsageError,
                remedy="it must be a JSON list of class names in the order of their ids",
            )
        else:
            names = [line.strip() for line in _text_of(path).splitlines() if line.strip()]
        if not names:
            raise UsageError(f"--labels {path} must name at least one class, found none")
        if path.is_file():  # the names of a store are those of its source
            _ids((answer, label) for label, name in enumerate(names) for answer in answers_of(name))
        return cls.of_names(names)


def _require_composed_apart(full: dict[str, int]) -> None:
    seen: dict[str, str] = {}
    for name in full:
        other = seen.setdefault(composed(name), name)
        if other != name:
            raise UsageError(
                f"class names must differ also to the eye, {name!r} and {other!r} are one name in two "
                "spellings of Unicode "
                "(NFC and NFD); rename one of them"
            )


def composed(name: str) -> str:
    """Return a name with its accents composed (NFC): macOS writes file names decomposed, and other systems do not."""
    return unicodedata.normalize("NFC", name)


def _ids(answers: Iterable[tuple[str, int]]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for answer, label in answers:
        if ids.setdefault(answer, label) != label:
            raise UsageError(
                f"class names must differ, {answer!r} is the name of labels {ids[answer]} and {label}; rename "
                "one of them"
            )
    return ids


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--labels {path} must be UTF-8 text, got {error}; save it as UTF-8") from error
