"""What encode does with odd input: each case is listed and read, and is a line of docs/odd-input.md."""

import io
import json
import os
import pickle
import re
import tarfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources.listing import list_source
from shards import BadImageError, SourceOptions, SourceReader, SourceRoots, UserError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "odd-input.md"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed):
    """A small picture file; no two seeds give the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(content) if isinstance(content, int) else content)


def packed(*members, form=tarfile.PAX_FORMAT):
    """A tar of files, links (`->`) and others (TarInfo), as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str) and content.startswith(("->", "=>")):
                member.type = tarfile.SYMTYPE if content[:2] == "->" else tarfile.LNKTYPE
                member.linkname = content[2:]
                tar.addfile(member)
                continue
            content = png(content) if isinstance(content, int) else content
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_of(*members, name="x.tar", **how):
    def make(folder):
        put(folder / name, packed(*members, **how))
        return folder / name

    return make


def tars_of(**contents):
    def make(folder):
        for name, members in contents.items():
            put(folder / f"{name}.tar", members if isinstance(members, bytes) else packed(*members))
        return folder

    return make


def folder_of(**files):
    def make(folder):
        for name, content in files.items():
            put(folder / name, content)
        return folder

    return make


def files(names):
    return folder_of(**{name: number for number, name in enumerate(names)})


def csv_of(text, images=3):
    def make(folder):
        for number in range(images):
            put(folder / f"img/{number}.png", number)
        put(folder / "x.csv", text if isinstance(text, bytes) else text.encode())
        return folder / "x.csv"

    return make


def images(count, form=IMAGE):
    return pa.array([{"bytes": png(number), "path": None} for number in range(count)], form)


def parquet_of(name="x.parquet", **columns):
    def make(folder):
        pq.write_table(
            pa.table({key: c() if callable(c) else c for key, c in columns.items()}), folder / name
        )
        return folder / name

    return make


def both(*makers, then=None):
    def make(folder):
        made = [maker(folder) for maker in makers]
        return folder if then is None else then(folder, *made)

    return make


def changed(maker, change):
    """A source whose file is changed, given its bytes, after it was made."""

    def make(folder):
        path = maker(folder)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return make


def flipped_header(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        content[tar.getmembers()[1].offset + 150] ^= 1
    return content


def cut_at_header(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return content[: tar.getmembers()[1].offset]


def with_pipe(folder):
    put(folder / "0.png", 0)
    os.mkfifo(folder / "pipe.png")
    return folder


def with_tar_pipe(folder):
    put(folder / "x.tar", packed(("a/0.png", 0)))
    os.mkfifo(folder / "y.tar")
    return folder


def with_link_out(folder):
    put(folder.parent / "elsewhere" / "0.png", 0)
    put(folder / "a" / "1.png", 1)
    (folder / "a" / "link.png").symlink_to(folder.parent / "elsewhere" / "0.png")
    return folder


def sparse(form):
    """A tar with a sparse member, as GNU tar writes it in formats `S` (old), 0.1 and 1.0."""
    content = bytearray(4096)
    content[: len(png(0))] = png(0)
    real, pieces = len(content), [(0, 512), (1024, 512)]
    data = b"".join(bytes(content[first : first + length]) for first, length in pieces)
    if form == "S":
        header = bytearray(tarfile.TarInfo("c/a.png").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"%011o\0" % len(data)
        header[156:157] = b"S"
        for place, number in enumerate([n for piece in pieces for n in piece]):
            header[386 + 12 * place : 398 + 12 * place] = b"%011o\0" % number
        header[483:495] = b"%011o\0" % real
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data + bytes(1024)
    member = tarfile.TarInfo("GNUSparseFile.1/a.png")
    numbers = [n for piece in pieces for n in piece]
    if form == "1.0":
        listed = b"".join(b"%d\n" % n for n in [len(pieces), *numbers])
        data = listed + bytes(-len(listed) % 512) + data
        member.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "c/a.png",
            "GNU.sparse.realsize": str(real),
        }  # fmt: skip
    else:
        member.pax_headers = {
            "GNU.sparse.map": ",".join(map(str, numbers)), "GNU.sparse.name": "c/a.png", "GNU.sparse.size": str(real),
        }  # fmt: skip
    member.size = len(data)
    return member.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512) + bytes(1024)


def sparse_tar(form):
    def make(folder):
        put(folder / "x.tar", sparse(form))
        return folder / "x.tar"

    return make


def features(names):
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


def named_labels(labels, names):
    def make(folder):
        table = pa.table({"image": images(len(labels)), "label": labels})
        pq.write_table(table.replace_schema_metadata(features(names)), folder / "x.parquet")
        return folder / "x.parquet"

    return make


@dataclass(frozen=True)
class Case:
    """Odd input and what becomes of it.

    Attributes:
        what: The input, as the page names it.
        answer: What encode does, as the page says it.
        make: Makes the input in an empty folder; gives the source.
        rows: Class by key of every image, or the beginning of the reason why it is unusable, behind `!`.
        said: What a line about the listing has.
        error: What the one line of the refusal has.
        code: Exit code of the refusal.
        options: What has been asked for.
    """

    what: str
    answer: str
    make: Callable[[Path], Path]
    rows: dict[str, str | None] | None = None
    said: str = ""
    error: str = ""
    code: int = 2
    options: SourceOptions = field(default_factory=SourceOptions)


REFUSED = "refused: "

CASES = [
    # Tars
    Case(
        "a tar with a damaged header",
        REFUSED + "file and offset are named (exit code 1)",
        changed(tar_of(("a/0.png", 0), ("a/1.png", 1), ("a/2.png", 2)), flipped_header),
        error="x.tar is not a whole uncompressed tar: a damaged header at byte 1024",
        code=1,
    ),
    Case(
        "the same with `--take-readable`",
        "what is readable is encoded; the plan records how many bytes were not",
        changed(tar_of(("a/0.png", 0), ("a/1.png", 1), ("a/2.png", 2)), flipped_header),
        rows={"x/a/0": "a", "x/a/2": "a"},
        said="1024 bytes could not be read and are left out",
        options=SourceOptions(take_readable=True),
    ),
    Case(
        "a tar cut off between two members",
        REFUSED + "it does not end in two zero blocks",
        changed(tar_of(("0.png", 0), ("1.png", 1)), cut_at_header),
        error="it ends without the two zero blocks that end a tar",
        code=1,
    ),
    Case(
        "a tar cut off inside a member",
        REFUSED + "file and offset are named",
        changed(tar_of(("0.png", 0), ("1.png", 1)), lambda content: content[:1024]),
        error="x.tar is not a whole uncompressed tar: it",
        code=1,
    ),
    Case(
        "two tars joined with `cat`",
        REFUSED + "the place where the second begins is named",
        changed(tar_of(("0.png", 0)), lambda content: content + packed(("1.png", 1))),
        error="more behind its end, as if two tars had been joined, at byte 10240",
        code=1,
    ),
    Case(
        "the same with `--take-readable`",
        "the images of both",
        changed(tar_of(("0.png", 0)), lambda content: content + packed(("1.png", 1))),
        rows={"x/0": None, "x/1": None},
        options=SourceOptions(take_readable=True),
    ),
    Case(
        "one zero block in the middle of a tar",
        REFUSED + "two of them end a tar",
        changed(
            tar_of(("0.png", 0)), lambda content: content[:1024] + bytes(512) + content[:1024] + bytes(1024)
        ),
        error="one zero block alone",
        code=1,
    ),
    Case(
        "a damaged tar inside a tar",
        REFUSED + "the inner tar is named",
        tar_of(
            ("n01.tar", packed(("0.png", 0))),
            ("n02.tar", bytes(flipped_header(bytearray(packed(("0.png", 0), ("1.png", 1)))))),
        ),
        error="the inner tar n02.tar of ",
        code=1,
    ),
    Case(
        "an empty file named `.tar`",
        REFUSED + "it is no whole tar",
        changed(tar_of(("0.png", 0)), lambda content: b""),
        error="it ends without",
        code=1,
    ),
    Case(
        "a tar whose name ends in `.tar.gz`",
        REFUSED + "it has to be unpacked first",
        tar_of(("0.png", 0), name="x.tar.gz"),
        error="unpack it first",
    ),
    Case(
        "`{00..01}.tar` where both are there",
        "as a shell expands it",
        both(
            tars_of(**{"00": [("a/0.png", 0)], "01": [("a/1.png", 1)]}),
            then=lambda folder, _: folder / "{00..01}.tar",
        ),
        rows={"00/a/0": "a", "01/a/1": "a"},
    ),
    Case(
        "`{00..02}.tar` where one is missing",
        REFUSED + "the missing one is named",
        both(
            tars_of(**{"00": [("a/0.png", 0)], "01": [("a/1.png", 1)]}),
            then=lambda folder, _: folder / "{00..02}.tar",
        ),
        error="02.tar is not",
    ),
    Case(
        "sparse members of tars (GNU, pax 1.0)",
        "the files as they were, with their holes",
        sparse_tar("S"),
        rows={"x/c/a": "c"},
    ),
    Case(
        "sparse members of tars (pax 0.1)",
        "the files as they were, with their holes",
        sparse_tar("0.1"),
        rows={"x/c/a": "c"},
    ),
    Case(
        "sparse members of tars (pax 1.0)",
        "the files as they were, with their holes",
        sparse_tar("1.0"),
        rows={"x/c/a": "c"},
    ),
    Case(
        "hard and symbolic links in a tar to its members",
        "the image, under the link's own name and class",
        tar_of(
            ("a/0.png", 0), ("b/1.png", "=>a/0.png"), ("c/2.png", "->../a/0.png"), ("d/3.png", "->../c/2.png")
        ),
        rows={"x/a/0": "a", "x/b/1": "b", "x/c/2": "c", "x/d/3": "d"},
    ),
    Case(
        "links in a tar to anything else",
        "unusable, with the reason; the class is kept",
        tar_of(
            ("a/0.png", 0), ("b/1.png", "->/etc/passwd"), ("b/2.png", "->2.png"), ("b/3.png", "=>gone.png")
        ),
        rows={
            "x/a/0": "a",
            "x/b/1": "!a symbolic link to /etc/passwd, which is not a file of this tar",
            "x/b/2": "!a symbolic link",
            "x/b/3": "!a hard link",
        },
    ),
    Case(
        "member names that are not UTF-8",
        "bytes that are not are written `\\xNN`",
        tar_of(("a/caf\udce9.png", 0), form=tarfile.USTAR_FORMAT),
        rows={"x/a/caf\\xe9": "a"},
    ),
    Case(
        "member names of hundreds of bytes (GNU)",
        "whole",
        tar_of((f"{'d' * 120}/{'e' * 140}.png", 0), form=tarfile.GNU_FORMAT),
        rows={f"x/{'d' * 120}/{'e' * 140}": "d" * 120},
    ),
    Case(
        "member names of hundreds of bytes (pax)",
        "whole",
        tar_of((f"ü{'d' * 120}/{'e' * 140}.png", 0)),
        rows={f"x/ü{'d' * 120}/{'e' * 140}": f"ü{'d' * 120}"},
    ),
    Case(
        "names that begin with a dot, in a tar or a folder",
        "left out and counted, also AppleDouble twins (`._x.tar`)",
        tar_of(
            ("n01.tar", packed(("0.png", 0), ("._0.png", b"x"))),
            ("._n01.tar", b"x"),
            (".hidden/n02.tar", b"x"),
        ),
        rows={"n01/0.png": "n01"},
        said="left out: 3 names that begin with a dot",
    ),
    # Kinds of tars
    Case(
        "a folder of tars, one a class (`n01440764.tar`, `cat.tar`)",
        "classes are the names of the tars",
        tars_of(n01440764=[("0.png", 0)], n01443537=[("0.png", 1)]),
        rows={"n01440764/0": "n01440764", "n01443537/0": "n01443537"},
        said="2 classes from the names of the tars",
    ),
    Case(
        "a folder of numbered tars without labels",
        "no classes, and the reason is printed",
        tars_of(**{"part-0": [("0.png", 0)], "part-1": [("1.png", 1)]}),
        rows={"part-0/0": None, "part-1/1": None},
        said="the tars are numbered",
    ),
    Case(
        "images beside tars inside a tar",
        REFUSED + "`--source-kind tar` or `images` takes one kind",
        tar_of(("n01.tar", packed(("0.png", 0))), ("loose.png", 1)),
        error="take one kind with --source-kind tar or --source-kind images",
    ),
    Case(
        "the same with `--source-kind images`",
        "the images alone",
        tar_of(("n01.tar", packed(("0.png", 0))), ("loose.png", 1)),
        rows={"x/loose": None},
        options=SourceOptions(kind="images"),
    ),
    Case(
        "a tar of tars beside a tar of images",
        REFUSED + "both are named",
        tars_of(classes=[("n01.tar", packed(("0.png", 0)))], flat=[("1.png", 1)]),
        error="a tar of tars and a tar of images are side by side",
    ),
    Case(
        "tars beside class folders",
        REFUSED + "`--source-kind` takes one kind",
        both(tars_of(n01=[("0.png", 0)]), files(["n01/0.png"])),
        error="take one kind with --source-kind tar or images",
    ),
    Case(
        "a parquet file beside images",
        REFUSED + "`--source-kind` takes one kind",
        both(parquet_of(fact=[1]), files(["0.png"])),
        error="1 .parquet files (such as x.parquet) and images (such as 0.png)",
    ),
    Case(
        "`train-*` beside `test-*` files",
        REFUSED + "`--split train` takes one split",
        both(
            parquet_of("train-0.parquet", image=lambda: images(1)),
            parquet_of("test-0.parquet", image=lambda: images(1)),
        ),
        error="holds the splits test and train side by side",
    ),
    Case(
        "the same with `--split test`",
        "the files of that split",
        both(
            parquet_of("train-0.parquet", image=lambda: images(1)),
            parquet_of("test-0.parquet", image=lambda: images(1)),
        ),
        rows={"test-0/000000000": None},
        options=SourceOptions(split="test"),
    ),
    Case(
        "folders `train` and `val` alone in a folder",
        REFUSED + "they are splits, not classes",
        files(["train/a/0.png", "val/a/1.png"]),
        error="holds splits side by side: train, val",
    ),
    Case(
        "the same with `--split val`",
        "the classes in that folder",
        files(["train/a/0.png", "val/b/1.png"]),
        rows={"b/1.png": "b"},
        options=SourceOptions(split="val"),
    ),
    # Labels of webdataset tars
    Case(
        "`.cls` files for some images alone",
        "the others have no class",
        tar_of(("0.png", 0), ("0.cls", "3"), ("1.png", 1)),
        rows={"x/0": "3", "x/1": None},
        said="1 of them have none",
    ),
    Case(
        "`.cls` files of -1",
        "no class",
        tar_of(("0.png", 0), ("0.cls", "-1")),
        rows={"x/0": None},
        said="no labels",
    ),
    Case(
        "pickled `.cls` files",
        REFUSED + "pickles are never opened",
        tar_of(("0.png", 0), ("0.cls", pickle.dumps(3))),
        error="is a pickle, which is never opened",
    ),
    Case(
        "a `.cls` file of more than a kilobyte",
        REFUSED + "it is not read",
        tar_of(("0.png", 0), ("0.cls", b"1" * 2000)),
        error="a label must be short",
    ),
    Case(
        "`.json` files without a label, images in folders",
        "classes are the folders",
        tar_of(("cat/0.png", 0), ("cat/0.json", '{"width": 9}')),
        rows={"x/cat/0": "cat"},
    ),
    Case(
        "`.json` files without a label",
        "no labels, and the keys are named",
        tar_of(("0.png", 0), ("0.json", '{"caption": "a"}')),
        rows={"x/0": None},
        said="keys of .json files are caption",
    ),
    Case(
        "labels in files of another ending",
        "no labels, and the endings are named",
        tar_of(("0.png", 0), ("0.index", "1")),
        rows={"x/0": None},
        said="files beside the images are .index 1",
    ),
    Case(
        "one image outside of the folders of a tar",
        "the others keep their classes",
        tar_of(("cat/0.png", 0), ("1.png", 1)),
        rows={"x/cat/0": "cat", "x/1": None},
    ),
    # Tables
    Case(
        "a column `labels`, `class_name` or `Label `",
        "it is the label",
        csv_of("path, Labels\nimg/0.png, cat\n"),
        rows={"img/0.png": "cat"},
        said="column Labels",
    ),
    Case(
        "several columns of labels, none of them `label`",
        REFUSED + "`--label-column` names one",
        parquet_of(img=lambda: images(1), fine_label=[3], coarse_label=[1]),
        error="several columns of labels: fine_label, coarse_label",
    ),
    Case(
        "the same with `--label-column coarse_label`",
        "that column",
        parquet_of(img=lambda: images(1), fine_label=[3], coarse_label=[1]),
        rows={"x/000000000": "1"},
        options=SourceOptions(label_column="coarse_label"),
    ),
    Case(
        "no column of labels",
        "no labels, and the columns are named",
        parquet_of(image=lambda: images(1), caption=["a"]),
        rows={"x/000000000": None},
        said="no labels; columns are image, caption",
    ),
    Case(
        "labels 2.0, 10.0 and 1.0, NaN and nulls",
        "classes 1, 2 and 10 in numeric order; none where there is no number",
        parquet_of(image=lambda: images(5), label=[2.0, 10.0, 1.0, float("nan"), None]),
        rows={f"x/{n:09d}": c for n, c in enumerate(["2", "10", "1", None, None])},
    ),
    Case(
        "2.0 and 10.0 in a csv file",
        "classes 2 and 10",
        csv_of("path,label\nimg/0.png,2.0\nimg/1.png,10.0\nimg/2.png,\n"),
        rows={"img/0.png": "2", "img/1.png": "10", "img/2.png": None},
    ),
    Case(
        "a label of 2.5",
        REFUSED + "a class is a text or a whole number",
        parquet_of(image=lambda: images(1), label=[2.5]),
        error="a text or a whole number",
    ),
    Case(
        "labels of -1",
        "no class",
        parquet_of(image=lambda: images(2), label=[0, -1]),
        rows={"x/000000000": "0", "x/000000001": None},
    ),
    Case(
        "lists of labels",
        REFUSED + "`--first-label` takes the first of each",
        parquet_of(image=lambda: images(1), label=[[1, 2]]),
        error="--first-label",
    ),
    Case(
        "the same with `--first-label`",
        "the first of each list; none where it is empty",
        parquet_of(image=lambda: images(2), label=[[1, 0], []]),
        rows={"x/000000000": "1", "x/000000001": None},
        options=SourceOptions(first_label=True),
    ),
    Case(
        "a label beyond the class names of a HuggingFace file",
        REFUSED + "file and row are named",
        named_labels([0, 2], ["cat", "dog"]),
        error="labels must be numbers of the 2 classes",
    ),
    Case(
        "two columns of images",
        REFUSED + "`--image-column` names one",
        parquet_of(conditioning_image=lambda: images(1), image=lambda: images(1)),
        error="several columns of images: conditioning_image, image",
    ),
    Case(
        "the same with `--image-column image`",
        "that column",
        parquet_of(conditioning_image=lambda: images(1), image=lambda: images(1)),
        rows={"x/000000000": None},
        options=SourceOptions(image_column="image"),
    ),
    Case(
        "a plain binary column of images",
        "it is the image",
        parquet_of(jpg=[png(0)], label=[1]),
        rows={"x/000000000": "1"},
    ),
    Case(
        "a column of lists of images",
        REFUSED + "a row has one image",
        parquet_of(images=lambda: pa.array([[{"bytes": png(0), "path": None}]], pa.list_(IMAGE))),
        error="holds lists of images",
    ),
    Case(
        "`large_binary` columns",
        "as any",
        parquet_of(image=lambda: images(1, pa.struct([("bytes", pa.large_binary())]))),
        rows={"x/000000000": None},
    ),
    Case(
        "`binary_view` columns",
        "as any",
        parquet_of(image=lambda: pa.array([png(0)], pa.binary_view())),
        rows={"x/000000000": None},
    ),
    Case(
        "a row without bytes and without a file",
        "unusable, with the reason",
        parquet_of(image=lambda: pa.array([None, {"bytes": png(1), "path": None}], IMAGE)),
        rows={"x/000000000": "!row of x.parquet holds no bytes", "x/000000001": None},
    ),
    Case(
        "a row whose `path` leads out of the file's folder",
        "unusable, unless `--source` names that folder",
        both(
            with_link_out,
            parquet_of(image=lambda: pa.array([{"bytes": None, "path": "../elsewhere/0.png"}], IMAGE)),
            then=lambda _, __, made: made,
        ),
        rows={"x/000000000": "!row of x.parquet holds no bytes"},
    ),
    Case(
        "a csv line that names a file outside of the csv's folder",
        "unusable, unless `--source` names that folder",
        both(with_link_out, csv_of("path\n../elsewhere/0.png\nimg/0.png\n"), then=lambda _, __, made: made),
        rows={"../elsewhere/0.png": "!outside of the source", "img/0.png": None},
    ),
    Case(
        "a csv file with semicolons or tabs",
        "as with commas",
        csv_of("path;label\nimg/0.png;cat\n"),
        rows={"img/0.png": "cat"},
    ),
    Case(
        "a csv file with a BOM and spaces around values",
        "neither counts",
        csv_of("\ufeffpath , label\n img/0.png ,cat \n\nimg/1.png, dog\n"),
        rows={"img/0.png": "cat", "img/1.png": "dog"},
    ),
    Case(
        "a csv file without a header",
        REFUSED + "what it begins with is named",
        csv_of("img/0.png,0\n"),
        error="its columns are img/0.png, 0",
    ),
    Case(
        "a csv line with another number of values",
        REFUSED + "the line is named",
        csv_of("path,label\nimg/0.png,cat,more\n"),
        error="line 2 has 3",
    ),
    Case(
        "one image with two classes in a csv file",
        REFUSED + "the image is named",
        csv_of("path,label\nimg/0.png,cat\nimg/0.png,dog\n"),
        error="an image must have one class",
    ),
    Case(
        "paths with backslashes in a csv file",
        REFUSED + "paths are written with /",
        csv_of("path,label\nimg\\0.png,cat\n"),
        error="paths are written with /",
    ),
    Case(
        "a parquet or csv file without rows",
        REFUSED + "there are no images",
        csv_of("path,label\n"),
        error="must hold images",
    ),
    # Folders
    Case(
        "`.jfif`, `.jp2`, `.avif` files, and files without an ending that begin like an image",
        "images",
        files(["c/a.jfif", "c/b.jp2", "c/c.avif", "c/d", "c/e.JPG_large"]),
        rows={f"c/{n}": "c" for n in ("a.jfif", "b.jp2", "c.avif", "d", "e.JPG_large")},
    ),
    Case(
        "other files among the images",
        "left out and counted by ending",
        folder_of(**{"c/0.png": 0, "c/a.heic": b"x", "c/b.txt": b"x"}),
        rows={"c/0.png": "c"},
        said="2 files that are no images by their endings (.heic 1, .txt 1)",
    ),
    Case(
        "a pipe named like an image",
        "left out and counted; it is never opened",
        with_pipe,
        rows={"0.png": None},
        said="1 pipes, sockets or devices",
    ),
    Case(
        "a pipe named like a tar",
        "left out; it is never opened",
        with_tar_pipe,
        rows={"x/a/0": "a"},
    ),
    Case(
        "a link that leads out of the folder",
        "followed, and counted",
        with_link_out,
        rows={"a/1.png": "a", "a/link.png": "a"},
        said="1 links lead out of the source",
    ),
    Case(
        "an empty class folder",
        "no class; a line says so",
        both(files(["a/0.png", "c/1.png"]), then=lambda folder, _: (folder / "b").mkdir() or folder),
        rows={"a/0.png": "a", "c/1.png": "c"},
        said="folders without images, which are no classes: b",
    ),
    Case(
        "classes numbered from 1",
        "labels are the numbers; a line says that 0 has no image",
        files(["1/0.png", "2/1.png", "10/2.png"][:2]),
        rows={"1/0.png": "1", "2/1.png": "2"},
        said="classes are numbered from 1 to 2",
    ),
    Case(
        "two class folders whose names differ in Unicode's composition alone",
        REFUSED + "both would look the same",
        files([unicodedata.normalize("NFC", "é/0.png"), unicodedata.normalize("NFD", "é/1.png")]),
        error="one name in two spellings of Unicode",
    ),
    Case(
        "images beside class folders",
        REFUSED + "one of each is named",
        files(["a/0.png", "1.png"]),
        error="got 1.png beside a/0.png",
    ),
]


def identifier(case):
    return re.sub(r"[^A-Za-z0-9]+", "-", case.what)[:60]


@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_odd_input_is_answered_as_the_page_says(case, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = str(case.make(folder))
    said = []
    if case.error:
        with pytest.raises(UserError) as refusal:
            list_source(source, options=case.options, tell=said.append)
        assert case.error in str(refusal.value)
        assert refusal.value.exit_code == case.code
        return
    listing = list_source(source, options=case.options, tell=said.append)
    assert rows_of(listing) == case.rows
    assert case.said in "\n".join(said)
    assert re.match(r"\d+ images(, no labels| in \d+ classes from )", said[0])


def rows_of(listing):
    """Class by key, or the reason up to where the case ends it."""
    found = {}
    with SourceReader(listing.archives, SourceRoots.of(listing.roots)) as reader:
        for record in listing.records:
            name = listing.class_names[record.label] if record.label >= 0 else None
            try:
                content = reader.read(record)
                assert content[:4] == b"\x89PNG"
                found[record.key] = name
            except BadImageError as error:
                found[record.key] = _Reason(f"!{error}")
    return found


class _Reason(str):
    """Equal to its own beginning."""

    def __eq__(self, other):
        return isinstance(other, str) and other.startswith("!") and self.startswith(other)

    __hash__ = str.__hash__


def test_the_page_has_a_line_for_each_case():
    lines = [
        line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")
    ]
    found = [tuple(cell.strip() for cell in line) for line in lines]
    assert found[1:] == [(case.what, case.answer) for case in CASES]
