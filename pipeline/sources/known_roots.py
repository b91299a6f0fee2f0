"""Where the images of the stores that were made on this machine lie, as its user has named it.

A plan says where each image is, and a store may come from a stranger: its plan could name any file of this machine and
any server. So images are read from a plan's addresses only at or below places that the user names now (`--source`), or
named when the plan was made here. That is remembered outside the store, by the plan's digest, in the user's
state folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from shards import Location, SourceRoots, as_location, replace_atomically
from shards.metadata.layout import PLAN


def known_roots(store: Location) -> tuple[str, ...]:
    """Return the places named when this store's plan was made on this machine; none of a store from elsewhere."""
    try:
        places = json.loads(_memory(store).read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home
        return ()
    return tuple(place for place in places if isinstance(place, str)) if isinstance(places, list) else ()


def remember_roots(store: Location, places: Iterable[str]) -> None:
    """Keep the places that the user named for a store; where they cannot be kept, they must be named again."""
    known = known_roots(store)
    together = sorted({*known, *SourceRoots.of(places).places})
    if together == sorted(known):
        return
    try:
        replace_atomically(_memory(store), json.dumps(together).encode())
    except (OSError, RuntimeError):
        return


def roots_of_source(source: str) -> tuple[str, ...]:
    """Return where the images of a source of files lie, as its user names it: a folder, or the one its files are in."""
    place = source
    if not as_location(source).exists() and not as_location(source).is_dir():
        place = re.split(r"[*?\[{]", source, maxsplit=1)[0]
    if place != source or not as_location(source).is_dir():
        place = place.rpartition("/")[0] or ("/" if place.startswith("/") else ".")
    return SourceRoots.of([place]).places


def _memory(store: Location) -> Path:
    plan = (store / PLAN).read_bytes()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "rae-latents" / "sources" / f"{hashlib.sha256(plan).hexdigest()}.json"
