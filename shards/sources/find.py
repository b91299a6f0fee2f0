"""Finding every image of a source of any kind."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from shards.errors import UsageError
from shards.sources.folder import find_in_folder
from shards.sources.found import IMAGE_SUFFIXES, Found, FoundImage
from shards.sources.tables import class_names_in, find_in_csv, find_in_parquet
from shards.sources.tars import find_in_tar_of_tars, is_tar_of_tars
from shards.sources.webdataset import find_in_webdataset
from shards.storage.location import Location, as_location


def find_images(source: str) -> Found:
    """Finds every image of a source, in an order that is the same on every machine.

    Args:
        source: An image folder; a tar of tars; a webdataset tar, or a folder or pattern of them; a parquet file, or a
            folder or pattern of them; a CSV file.

    Raises:
        UsageError: If there is no such source, or it holds no images.
    """
    found, class_names, notes = _find(source)
    images = sorted(found, key=lambda image: (image.key, image.uri, image.offset))
    if not images:
        some = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"SOURCE must hold images ({some}), found none in {source}")
    return Found(unique_keys(images), class_names, tuple(notes))


def _find(source: str) -> tuple[Iterable[FoundImage], tuple[str, ...], list[str]]:
    """The images of a source, its own class names, and what to tell of those left out."""
    paths = _files_of(source)
    if paths is None:
        return find_in_folder(as_location(source)), (), []
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".tar"}:
        if len(paths) == 1 and is_tar_of_tars(paths[0]):
            return find_in_tar_of_tars(paths[0]), (), []
        images, notes = find_in_webdataset(paths)
        return images, (), notes
    if suffixes == {".parquet"}:
        return find_in_parquet(paths), class_names_in(paths[0]), []
    if suffixes == {".csv"} and len(paths) == 1:
        return find_in_csv(paths[0]), (), []
    raise UsageError(
        "SOURCE must be an image folder, or tar, parquet or one csv file, "
        f"got {source} ({', '.join(sorted(suffixes)) or 'nothing'})"
    )


def _files_of(source: str) -> list[Location] | None:
    """The table or tar files that `source` stands for, or None if it is a folder of images."""
    path = as_location(source)
    if any(character in source for character in "*?[") and not path.exists():
        return sorted(path.parent.glob(path.name), key=_by_path)
    if path.is_file():
        return [path]
    if path.is_dir():
        for pattern in ("*.tar", "*.parquet"):
            files: list[Location] = sorted(path.glob(pattern), key=_by_path)
            if files:
                return files
        return None
    raise UsageError(
        f"SOURCE must be an image folder, tar, parquet or csv file, got {source}: it does not exist; give SOURCE, "
        "or set IMAGENET to a folder with one sub-folder for each class"
    )


def _by_path(path: Location) -> tuple[str, ...]:
    return tuple(str(path).split("/"))


def unique_keys(found: Iterable[FoundImage]) -> list[FoundImage]:
    """The same images; the second and later ones of one key get `#2`, `#3`, … behind it, in the given order."""
    seen: Counter[str] = Counter()
    images = []
    for image in found:
        seen[image.key] += 1
        count = seen[image.key]
        images.append(image if count == 1 else replace(image, key=f"{image.key}#{count}"))
    return images
