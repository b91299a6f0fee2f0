"""docs/api.md, made from the docstrings of the names that `shards` offers: ``python -m shards.testing.api_page``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import shards

GROUPS = {
    "Reading": [
        "open_store",
        "Store",
        "RowReader",
        "Loader",
        "Batch",
        "SampleDataset",
        "StreamBatchSampler",
        "webdataset_pipeline",
        "range_cache",
        "Statistics",
        "is_store",
    ],
    "Writing": [
        "StoreWriter",
        "ShardWriter",
        "Plan",
        "SourceRecord",
        "Recipe",
        "EncoderIdentity",
        "Int8Code",
    ],
    "Checking": ["verify_store", "Problem", "withdraw_damaged", "Manifest"],
    "Locations": ["as_location", "RemotePath"],
    "Errors": [
        "UserError",
        "UsageError",
        "StoreError",
        "StoreIncompleteError",
        "StoreDamagedError",
        "IdentityMismatchError",
        "UndecodableImageError",
        "RemoteError",
    ],
}
"""What programs of other people use, by purpose; all else at the door is for the packages of this repository."""

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def api_page() -> str:
    """Return the whole page as Markdown."""
    lines = [
        "# Names of the package `shards`",
        "",
        "`from shards import NAME` loads what is named and no more; none of it loads torch. This page is made from the",
        "docstrings by `make api`. Shapes are written `float32[D, h, w]`: N = h · w tokens of width D.",
        "Other names that the package offers are for the programs of this repository and may change with any version.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *_described(name, getattr(shards, name))]
    return "\n".join(lines) + "\n"


def _described(name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        yield f"- `{name}({thing.__bases__[0].__name__})`: {_text(thing)[0]}"
        return
    yield f"### {name}"
    yield ""
    if inspect.isclass(thing):
        yield from _rendered(_text(thing))
        for member, value in _members(thing):
            text = _text(value)
            if isinstance(value, classmethod):
                value = value.__func__
            arguments = "" if isinstance(value, property) or not callable(value) else _signature(value)
            yield ""
            yield f"**`{member}{arguments}`**"
            yield ""
            yield from _rendered(text)
    else:
        yield f"**`{name}{_signature(thing)}`**"
        yield ""
        yield from _rendered(_text(thing))


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield public methods and properties that the class itself defines and documents, in their order."""
    for name, value in vars(kind).items():
        documented = isinstance(value, property | classmethod) or callable(value) or hasattr(value, "func")
        if not name.startswith("_") and documented and inspect.getdoc(getattr(value, "func", value)):
            yield name, property(value.func) if hasattr(value, "func") else value


def _signature(function: Any) -> str:
    """Return the names and defaults of the arguments; types stand in the text."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    shown = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = str(inspect.Signature(shown))
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)


def _text(thing: Any) -> list[str]:
    return (inspect.getdoc(thing) or "").splitlines()


def _rendered(lines: list[str]) -> Iterator[str]:
    """Yield a docstring in Google's style as Markdown: sections become lists."""
    section = False
    for line in (line.replace("``", "`") for line in lines):
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            section = True
            yield f"*{line.rstrip(':')}*"
            yield ""
        elif section and re.match(r"    \S", line):
            name, colon, text = line.strip().partition(": ")
            yield f"- `{name}`: {text}" if colon and " " not in name else f"- {line.strip()}"
        elif section and line.strip():
            yield f"  {line.strip()}"
        else:
            section = section and not line.strip()
            yield line


if __name__ == "__main__":
    sys.stdout.write(api_page())
