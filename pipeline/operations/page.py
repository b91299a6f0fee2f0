"""Self-contained HTML pages: tables, charts and images inside one file, no links outside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from shards import Store, UsageError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .notice { background: #fff3cd; padding: .6rem 1rem; } p.small { color: #666; }
"""


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write sections of HTML as one page.

    Raises:
        UsageError: If the file cannot be written.
    """
    title = html.escape(title)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{''.join(sections)}</html>\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--out must be a file that can be written, {path} is not: {error}; name another"
        ) from error


def read_rows(store: Store, view: str, field: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return the rows of a field as they are stored, [len(rows), *row_shape]."""
    reader = store.reader(view, field)
    out = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    return out


def table(lines: Iterable[Sequence[object]]) -> str:
    """Return a table of lines; the first cell of each is its heading."""
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th>"
        + "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, *values in lines
    )
    return f"<table>{cells}</table>"


def axes_of(height: float) -> tuple[Figure, Any]:
    """Return a figure of the page's width and its one plot."""
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def chart(figure: Figure, description: str) -> str:
    """Return a figure as HTML of the page."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "store"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return img(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", description)


def png(image: Image.Image) -> str:
    """Return an image's bytes as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def img(source: str, description: str) -> str:
    """Return an image as HTML of the page."""
    return f'<p><img alt="{html.escape(description)}" src="{source}"></p>'
