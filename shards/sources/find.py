"""Finding every image of a source of any kind."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import PurePosixPath
from typing import get_args

from shards.errors import UsageError
from shards.metadata.plan import Plan
from shards.sources.addresses import printable, whole_address
from shards.sources.class_labels import odd_numbering
from shards.sources.csv_lists import find_in_csv
from shards.sources.folder import FolderListing
from shards.sources.found import IMAGE_SUFFIXES, Found, FoundImage, SourceKind, SourceOptions, is_hidden, some
from shards.sources.parquet_files import KnownRows, find_in_parquet
from shards.sources.roots import SourceRoots
from shards.sources.tars import TarListing
from shards.storage.location import Location, as_location, children

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".lz4")
"""Endings of files that have to be unpacked first."""
_SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_AS_THEY_ARE = SourceOptions()


def find_images(source: str, options: SourceOptions = _AS_THEY_ARE, known: Plan | None = None) -> Found:
    """Find every image of a source, in an order that is the same on every machine.

    Args:
        source: An image folder; a tar of tars; a webdataset tar, or a folder or pattern of them; a parquet file, or a
            folder or pattern of them; a CSV file. A pattern may have `*`, `?`, `[…]` and `{00..31}` or `{a,b}`.
        options: What to take where a source can be read in several ways.
        known: A plan of the same source: of its parquet files that are untouched since, no image is read again.

    Raises:
        UsageError: If there is no such source, it holds no images, or can be read in several ways.
    """
    found = _find(source, options, known)
    images = sorted(found.images, key=lambda image: (image.key, image.uri, image.offset))
    if not images:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        there = "; ".join(found.notes)
        raise UsageError(
            f"SOURCE must hold images ({endings}), found none in {source}" + f"; {there}" * bool(there)
        )
    notes = (*found.notes, *odd_numbering({i.class_name for i in images if i.class_name is not None}))
    return replace(found, images=unique_keys(images), notes=notes)


def _find(source: str, options: SourceOptions, known: Plan | None) -> Found:
    paths = _named_files(source)
    if paths is None:
        folder = as_location(source)
        files, folders = _shown(folder)
        split = _split_folder(folder, folders, options)
        paths = _archives_in(folder, files, options)
        if paths is None:
            root = folder if split is None else folder / split
            listing = FolderListing()
            found = listing.find(root)
            roots = SourceRoots.of([root]).places
            return replace(found, notes=(*found.notes, *listing.left_out.lines()), roots=roots)
    return _find_in_files(source, _of_one_split(source, paths, options), options, known)


def _find_in_files(source: str, paths: list[Location], options: SourceOptions, known: Plan | None) -> Found:
    suffixes = {path.suffix.lower() for path in paths}
    packed = [path for path in paths if path.suffix.lower() in _COMPRESSED]
    if packed:
        raise UsageError(
            f"images are read where they are, which a compressed file does not allow: {packed[0]}; unpack "
            "it first, such as "
            "with `gunzip -k` a .tar.gz"
        )
    if suffixes == {".tar"}:
        listing = TarListing(options)
        found = listing.find(paths)
        found = replace(found, notes=(*found.notes, *listing.notes()))
    elif suffixes == {".parquet"}:
        found = find_in_parquet(paths, options, {} if known is None else KnownRows.of_plan(known))
    elif len(paths) == 1 and suffixes <= {".csv", ".tsv"}:
        found = find_in_csv(paths[0], options)
        return replace(found, roots=SourceRoots.of_table(paths[0], options).places)
    else:
        raise UsageError(
            "SOURCE must be an image folder, or tar, parquet or one csv file, "
            f"got {source} ({', '.join(sorted(suffixes)) or 'nothing'})"
        )
    beside = {image.uri for image in found.images} - {whole_address(path) for path in paths}
    tables = [SourceRoots.of_table(path, options).places for path in paths] if beside else []
    own = [whole_address(path) for path in paths]
    return replace(found, roots=tuple(dict.fromkeys([*own, *(place for part in tables for place in part)])))


def _named_files(source: str) -> list[Location] | None:
    """Return the table or tar files that `source` names, or None if it is a folder."""
    path = as_location(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return None
    if any(character in source for character in "*?[{"):
        found = [file for pattern in expanded(source) for file in _matching(pattern)]
        unique = list(dict.fromkeys(found))
        if unique:
            return unique
    raise UsageError(
        f"SOURCE must be an image folder, tar, parquet or csv file, got {source}: it does not exist; give "
        "SOURCE, "
        "or set IMAGENET to a folder with one sub-folder for each class"
    )


def _matching(pattern: str) -> list[Location]:
    path = as_location(pattern)
    if not any(character in pattern for character in "*?["):
        if not path.is_file():
            raise UsageError(f"every file of a pattern in braces must be there, {pattern} is not")
        return [path]
    names = (name for name in _shown(path.parent)[0] if PurePosixPath(name).match(path.name))
    return sorted((path.parent / name for name in names), key=_by_path)


def expanded(pattern: str) -> Iterator[str]:
    """Expand a pattern with `{00..31}` or `{a,b}`, in order, as a shell does."""
    pieces: list[list[str]] = []
    for place, text in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if place % 2 == 0:
            pieces.append([text])
            continue
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
        if ends:
            first, last = int(ends[1]), int(ends[2])
            width = max(map(len, ends.groups())) if "0" in (ends[1][0], ends[2][0]) else 0
            step = 1 if first <= last else -1
            if abs(last - first) > 1_000_000:
                raise UsageError(
                    f"a pattern in braces must represent at most a million files, got {{{text}}}"
                )
            pieces.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        else:
            pieces.append(text.split(",") if "," in text else ["{" + text + "}"])
    return ("".join(parts) for parts in product(*pieces))


def _archives_in(folder: Location, files: list[str], options: SourceOptions) -> list[Location] | None:
    """Return the tars, parquet or csv files of a folder, or None if its images are to be taken.

    Raises:
        UsageError: If there are several kinds, and none was chosen.
    """
    by_kind: dict[str, list[Location]] = {}
    for kind in get_args(SourceKind):
        # A csv file among images is rather a list of something else.
        if kind == "images" or (kind == "csv" and options.kind != "csv"):
            continue
        if found := [folder / name for name in files if name.endswith(f".{kind}")]:
            by_kind[kind] = found
    if options.kind is not None:
        if options.kind == "images":
            return None
        if not by_kind.get(options.kind):
            raise UsageError(f"--source-kind {options.kind}: {folder} holds no .{options.kind} files itself")
        return by_kind[options.kind]
    if not by_kind:
        return None
    image = next(FolderListing().files(folder), None)
    if image is not None or len(by_kind) > 1:
        _refuse_mixture(folder, by_kind, None if image is None else "/".join(image[1]))
    return next(iter(by_kind.values()))


def _refuse_mixture(folder: Location, by_kind: dict[str, list[Location]], image: str | None) -> None:
    parts = [f"{len(files)} .{kind} files (such as {files[0].name})" for kind, files in by_kind.items()]
    kinds = list(by_kind)
    if image is not None:
        parts.append(f"images (such as {printable(image)})")
        kinds.append("images")
    raise UsageError(
        f"{folder} holds {' and '.join(parts)} side by side; take one kind with --source-kind "
        f"{' or '.join(kinds)}, or "
        "name a folder or pattern of one kind"
    )


def _split_folder(folder: Location, names: list[str], options: SourceOptions) -> str | None:
    """Return the folder of the split that was asked for, where a folder holds nothing but splits.

    Raises:
        UsageError: If there are several, and none was named.
    """
    splits = {name: _SPLITS.get(name.lower()) for name in names}
    if len(set(splits.values()) - {None}) < 2 or None in splits.values():
        return None
    if options.split is None:
        raise UsageError(
            f"{folder} holds splits side by side: {some(sorted(names))}; name one with --split, such as "
            f"--split {min(names)}, "
            f"or give {folder / min(names)}"
        )
    wanted = [name for name in names if options.split in (name, splits[name])]
    if len(wanted) != 1:
        raise UsageError(f"--split must be one of {some(sorted(names))}, got {options.split}")
    return wanted[0]


def _shown(folder: Location) -> tuple[list[str], list[str]]:
    """Return the names of the files and of the folders in a folder, sorted; without those that begin with a dot."""
    files, folders = ([name for name in names if not is_hidden(name)] for names in children(folder))
    return files, folders


def _split_of(path: Location) -> str | None:
    words = re.split(r"[^A-Za-z]+", path.stem)
    found = {_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _of_one_split(source: str, paths: Sequence[Location], options: SourceOptions) -> list[Location]:
    """Return the files of one split, if their names say that there are several.

    Raises:
        UsageError: If there are several, and none was named.
    """
    splits = {path: _split_of(path) for path in paths}
    found = sorted({split for split in splits.values() if split is not None})
    if options.split is not None:
        wanted = _SPLITS.get(options.split.lower(), options.split)
        chosen = [path for path in paths if splits[path] == wanted]
        if not chosen:
            raise UsageError(
                f"--split must be one of {some(found) or 'none'} in {source}, got {options.split}"
            )
        return chosen
    if len(found) > 1:
        examples = [next(path.name for path in paths if splits[path] == split) for split in found]
        raise UsageError(
            f"{source} holds the splits {' and '.join(found)} side by side (such as {some(examples)}); name "
            "one with "
            f"--split, such as --split {found[-2] if 'train' not in found else 'train'}"
        )
    return list(paths)


def _by_path(path: Location) -> tuple[str, ...]:
    return tuple(str(path).split("/"))


def unique_keys(found: Iterable[FoundImage]) -> list[FoundImage]:
    """Return the same images; the second and later ones of one key get `#2`, `#3`, … behind it, in the given order."""
    seen: Counter[str] = Counter()
    images = []
    for image in found:
        seen[image.key] += 1
        count = seen[image.key]
        images.append(image if count == 1 else replace(image, key=f"{image.key}#{count}"))
    return images
