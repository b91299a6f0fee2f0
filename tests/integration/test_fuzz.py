"""Stores, sources and run folders with one file spoiled, against every command that reads them.

Each case runs in a child of its own, with a limit of memory and of time: it ends with 0 and right data, or with 1 or 2
and one line. Never with a traceback, and never with a touch of the folder beside the one that is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import StoreWriter, decode_image, find_images, open_store, printable_text
from shards.command_line import run_command
from shards.formats import FORMATS
from shards.metadata.commit import ObjectRecord
from shards.metadata.layout import MANIFEST
from shards.testing.contract import StoreKind, build_store, make_code, make_plan, make_recipe, write_shard
from shards.writing.added_fields import publish_fields

MEMORY = 3 << 30
"""Bytes a case may allocate beyond what the libraries hold when it begins."""
SECONDS = 60
"""A case that takes longer hangs; one takes under a second on an idle machine."""
RUN = Path(__file__).parent.parent / "fixtures" / "runs" / "decoder"

KINDS = {
    "zarr": StoreKind(
        num_images=7, num_shards=2, compression="blosc", image_compression="zstd", class_token=True
    ),
    "webdataset": StoreKind(num_images=7, num_shards=2, format="webdataset", bad={3: "not an image"}),
    "int8": StoreKind(num_images=7, num_shards=2, dtype="int8", image_size=0),
    "unfinished": StoreKind(num_images=7, num_shards=3, dtype="int8", views=("center",)),
}
assert {kind.format for kind in KINDS.values()} == set(FORMATS)


class _NotRightError(AssertionError):
    """A command has ended well with wrong data."""


# What is spoiled


def build_corpus(root: Path) -> None:
    """One folder of each kind of thing that commands read."""
    for name, kind in KINDS.items():
        if name != "unfinished":
            build_store(root / name, kind)
    build_store(root / "int8/fields/other", StoreKind(num_images=7, num_shards=2, width=3, image_size=0))
    publish_fields(root / "int8")
    _unfinished(root / "unfinished", KINDS["unfinished"])
    shutil.copytree(RUN, root / "run")  # of an earlier version, without digests
    _checkpoint(root / "run")
    _sources(root)


def _checkpoint(run: Path) -> None:
    """A checkpoint of this version, with digests, beside the earlier one."""
    import torch

    from train.engine.checkpoint import save_checkpoint

    save_checkpoint(run / "checkpoints", 5, {"model": {"weights": torch.arange(1000.0)}}, {"epoch": 1})


def _unfinished(path: Path, kind: StoreKind) -> None:
    plan = make_plan(kind)
    writer = StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan, make_code(kind))
    write_shard(writer, "center", 0)
    owner = {"host": "elsewhere", "pid": 7, "born": "1", "name": "worker 0"}
    lease = {"owner": owner, "token": "abc", "beat": 3}
    for name, content in (
        (".work/leases/shard-00001.json", lease),
        (".work/failures/00001.json", ["OSError: no"]),
        ("repaired.json", {"nbytes": {}}),
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))


def _sources(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = {}
    for number in range(6):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (12, 9, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, ("PNG", "JPEG")[number % 2])
        contents[f"class {number % 2}/{number}.{('png', 'jpg')[number % 2]}"] = buffer.getvalue()
    for name, content in contents.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    for folder in ("tar", "webdataset source", "parquet", "table"):
        (root / folder).mkdir()
    with tarfile.open(root / "tar/images.tar", "w") as archive:
        for name, content in contents.items():
            _add(archive, name, content)
    with tarfile.open(root / "webdataset source/0.tar", "w") as archive:
        for number, content in enumerate(contents.values()):
            _add(archive, f"{number}.png", content)
            _add(archive, f"{number}.cls", b"%d" % (number % 2))
    rows = [{"image": {"bytes": content, "path": name}, "label": 0} for name, content in contents.items()]
    pq.write_table(pa.Table.from_pylist(rows), root / "parquet/0.parquet")
    lines = "".join(f"../folder/{name},{number % 2}\n" for number, name in enumerate(contents))
    (root / "table/images.csv").write_text(f"path,label\n{lines}")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# How it is spoiled

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        10**13,
        2**31,
        2**63,
        2**64,
        10**30,
        1.5,
        1e308,
        -0.0,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "../../precious",
        "/etc/passwd",
        "\x1b[2J",
        "\ud7ff\u202e",
        "9" * 5000,
        [],
        [[]],
        {},
        [1, 2, 3],
        {"a": {}},
    ),
    *("random:0", "int8", "center", "zarr"),
)


def spoil(path: Path, precious: Path, draw: random.Random) -> str:
    """Change one file of a folder in some way; says how."""
    ways: list[Callable[[Path, Path, random.Random], str]] = [
        *(_flip, _flip, _truncate, _extend, _overwrite, _link, _numbers),
        *([_value, _value, _value, _nest] if path.suffix in (".json", ".jsonl") else []),
    ]
    return draw.choice(ways)(path, precious, draw)


def _flip(path: Path, precious: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 30)) if content else 0):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "bits flipped"


def _truncate(path: Path, precious: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice((0, 1, len(content) // 2, max(0, len(content) - 1)))])
    return "truncated"


def _extend(path: Path, precious: Path, draw: random.Random) -> str:
    with path.open("ab") as file:
        file.write(draw.choice((b"\0", b"}", draw.randbytes(700), bytes(1024))))
    return "extended"


def _overwrite(path: Path, precious: Path, draw: random.Random) -> str:
    path.write_bytes(
        draw.choice((b"[" * 200_000, b'{"a":' * 200_000, draw.randbytes(300), b"null", b"[]", b"{}", b"\xff"))
    )
    return "overwritten"


def _numbers(path: Path, precious: Path, draw: random.Random) -> str:
    """Eight bytes become a number that is hard on arithmetic."""
    content = bytearray(path.read_bytes())
    number = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 60))
    at = (
        draw.randrange(max(1, len(content) - 8))
        if draw.random() < 0.5
        else max(0, len(content) - draw.randrange(8, 80))
    )
    content[at : at + 8] = number.to_bytes(8, "little")
    path.write_bytes(content)
    return "a number replaced"


def _link(path: Path, precious: Path, draw: random.Random) -> str:
    if draw.random() < 0.4 and path.parent.name != "spoiled":  # the folder that is named may be a link
        path = path.parent
        shutil.rmtree(path)
        path.symlink_to(precious)
        return "its folder linked"
    path.unlink()
    kind = draw.choice(("/dev/zero", "pipe", "file", "folder", "itself", "missing"))
    if kind == "pipe":
        os.mkfifo(path)
    else:
        target = {"file": precious / "00000.json", "folder": precious, "itself": path, "missing": path / "x"}
        path.symlink_to(target.get(kind, kind))
    return f"linked to {kind}"


def _value(path: Path, precious: Path, draw: random.Random) -> str:
    """Some value of a JSON document becomes another, goes, or gets a neighbour."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = draw.randrange(len(lines))
    document = json.loads(lines[number])
    places = list(_places(document))
    inside, key = draw.choice(places)
    act = draw.randrange(8)
    if act == 0:
        del inside[key]
    elif act == 1 and isinstance(inside, dict):
        inside["another"] = draw.choice(ODD_VALUES)
    else:
        inside[key] = draw.choice(ODD_VALUES)
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return f"value {key!r} replaced"


def _nest(path: Path, precious: Path, draw: random.Random) -> str:
    document = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    inside, key = draw.choice(list(_places(document)))
    mark = "deep"
    inside[key] = mark
    depth = draw.choice((100, 1000, 200_000))
    path.write_text(json.dumps(document).replace(f'"{mark}"', "[" * depth + "]" * depth) + "\n")
    return f"{key!r} nested {depth} deep"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def sign_again(store: Path, spoiled: Path) -> bool:
    """Make a store's manifest agree with a spoiled file, as a forger would; says whether it could be done."""
    name = str(spoiled.relative_to(store))
    if not spoiled.is_file() or spoiled.is_symlink() or name == MANIFEST:
        return False
    manifest = json.loads((store / MANIFEST).read_text())
    entries = {entry["path"]: entry for entry in manifest["objects"]}
    if name not in entries:
        return False
    content = spoiled.read_bytes()
    algorithm = next(key for key in entries[name] if key not in ("path", "nbytes"))
    from shards.metadata.identity import Recipe, canonical_json
    from shards.storage.digests import digest_of_bytes

    entries[name] |= ObjectRecord(
        name, len(content), digest_of_bytes(content, algorithm), algorithm
    ).to_dict()
    if name == "zarr.json":
        with contextlib.suppress(Exception):
            manifest["recipe"] = json.loads(content)["attributes"]["recipe"]
            recipe = Recipe.from_dict(manifest["recipe"])
            manifest |= {
                "recipe_id": recipe.id,
                "encoder_id": recipe.encoder.id,
                "num_images": recipe.num_images,
            }
    del manifest["digest"]
    manifest["digest"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    (store / MANIFEST).write_bytes(text.encode() + b"\n")
    return True


# What reads it


def read_rows(store: Path) -> dict[str, bytes]:
    """Every number that a trainer takes from a store."""
    opened = open_store(store)
    found: dict[str, Any] = {"labels": opened.labels, "valid": opened.valid_rows}
    for view in opened.views:
        for field in opened.recipe.fields(view):
            reader = opened.reader(view, field)
            rows = np.zeros((len(opened.valid_rows), *reader.row_shape), reader.dtype)
            reader.read(opened.valid_rows, rows)
            found[f"{view}/{field}"] = rows
    statistics = opened.statistics()
    found |= {"mean": statistics.mean, "variance": statistics.variance}
    if opened.code is not None:
        found["code"] = opened.code.table
    return {name: np.ascontiguousarray(values).tobytes() for name, values in found.items()}


def _main(*arguments: object) -> int:
    from pipeline.cli import main

    return main([str(argument) for argument in arguments])


def commands_of(name: str, path: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a folder of the corpus."""
    if name == "run":
        return _run_commands(path)
    if name not in KINDS:
        return {"list and read": lambda: _read_source(path)}
    commands: dict[str, Callable[[], Any]] = {
        "verify": lambda: _main("verify", path),
        "inspect": lambda: _main("inspect", path, "--json"),
        "clean": lambda: _main("clean", path, "--wait", 0),
        "withdraw": lambda: _main("verify", path, "--withdraw", "--wait", 0),
        "give up": lambda: _main("clean", path, "--wait", 0, "--give-up"),
        "report": lambda: _main("report", path, "--out", out / "page.html"),
        "continue": lambda: _continue(path, KINDS[name]),
    }
    if name != "unfinished":
        commands |= {
            "read": lambda: read_rows(path) and None,
            "follow": lambda: _main("verify", path, "--follow-links"),
            "stats": lambda: _main("stats", path),
            "convert": lambda: _main("convert", path, "--out", out / "copy", "--format", "webdataset"),
            "diff": lambda: _main("diff", path, path),
            "subset": lambda: _main("subset", path, "--out", out / "subset", "--sample", 3, "--shards", 1),
        }
    return commands


def _continue(path: Path, kind: StoreKind) -> None:
    plan = make_plan(kind)
    writer = StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan, make_code(kind))
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=kind.bad)
    writer.finalize()


def _run_commands(path: Path) -> dict[str, Callable[[], Any]]:
    from train.engine.checkpoint import checkpoints, prune, read_part, read_state, require_intact
    from train.report.finished_runs import read_runs
    from train.report.metrics_file import read_metrics
    from train.settings.saved_settings import load_settings
    from train.verify import main as verify
    from train.weights.snapshot import load_snapshot

    def resume() -> None:
        load_settings(path / "config.json")
        read_metrics(path / "metrics.jsonl")
        for checkpoint in checkpoints(path / "checkpoints"):
            state = read_state(checkpoint)
            require_intact(checkpoint, state)
            parts = {part: read_part(checkpoint, part.removesuffix(".safetensors")) for part in state.files}
            if state.step == 5 and parts["model.safetensors"]["weights"].tolist() != list(range(1000)):
                raise _NotRightError("the weights are others than were written")

    return {
        "verify": lambda: verify([str(path)]),
        "resume": resume,
        "load": lambda: load_snapshot(path / "snapshots/latest.safetensors") and None,
        "compare": lambda: read_runs([path]) and None,
        "prune": lambda: prune(path / "checkpoints", 1),
    }


def _read_source(path: Path) -> None:
    from shards import BadImageError, SourceReader, SourceRoots, UndecodableImageError

    found = find_images(str(path))
    with SourceReader(found.archives, SourceRoots.of([str(path), str(path.parent / "folder")])) as reader:
        for image in found.images:
            with contextlib.suppress(BadImageError, UndecodableImageError):
                decode_image(reader.read(image, any_size=True))


# One case


def in_child(work: Callable[[], None], log: Path) -> int | None:
    """Run something in a child with a limit of memory; gives its exit code, None if it hung."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
                resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
                work()
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(name: str, case: Path, signed: bool, original: Path, draw: random.Random) -> None:
    """Run some of the commands on a spoiled folder, each on what the one before has left; raises what is wrong."""
    commands = commands_of(name, case / "spoiled", case / "out")
    for command in draw.sample(sorted(commands), min(len(commands), 3)):
        text = io.StringIO()
        sys.stdout.write(f"--- {command}\n")
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            code = run_command(commands[command], on_interrupt=lambda: "")
        err = text.getvalue()
        sys.stdout.write(f"{err}\n")
        assert code in (0, 1, 2), f"{command} ended with {code}"
        if code:
            last = err.strip().split("\n")[-1].split("\r")[-1]
            assert last.startswith("error: ") or command in ("verify", "diff"), f"{command} says {last!r}"
            assert printable_text(last) == last
            assert len(last) < 2000, f"{command} says {len(last)} characters"
        elif command == "read" and not signed and read_rows(case / "spoiled") != read_rows(original):
            raise _NotRightError("the rows are others than were written")


def fuzz(root: Path, corpus: Path, cases: range) -> list[str]:
    """Spoil and read; gives a line a case that went wrong."""
    files = {
        name: sorted(path for path in (corpus / name).rglob("*") if path.is_file())
        for name in sorted(path.name for path in corpus.iterdir())
    }
    precious = root / "precious"
    for name in ("00000.json", "shard-00001.json", "c/0/0/0", "zarr.json", "step-00000001/state.json"):
        (precious / name).parent.mkdir(parents=True, exist_ok=True)
        (precious / name).write_text("mine")
    before = _listing(precious)
    wrong = []
    for number in cases:
        draw = random.Random(number)
        name = draw.choice(sorted(files))
        chosen = draw.choice(files[name]).relative_to(corpus / name)
        case = root / f"case {number}"
        how: list[str] = []
        log = root / f"{number}.log"
        shutil.copytree(corpus / name, case / "spoiled")
        if name == "table":
            shutil.copytree(corpus / "folder", case / "folder")
        (case / "out").mkdir()
        how.append(spoil(case / "spoiled" / chosen, precious, draw))
        signed = name in KINDS and name != "unfinished" and draw.random() < 0.5 and _signed(case, chosen)
        work = partial(judge, name, case, signed, corpus / name, draw)
        code = in_child(work, log)
        text = log.read_text(errors="replace")
        if code != 0 or "Traceback" in text:
            ended = "hung" if code is None else f"ended with {code}"
            wrong.append(
                f"case {number}: {name}/{chosen}, {how[0]}, signed {signed}: {ended}\n{text[-2500:]}"
            )
        if _listing(precious) != before:
            wrong.append(f"case {number}: {name}/{chosen}, {how[0]}: files outside were touched")
            break
        shutil.rmtree(case)
    return wrong


def _signed(case: Path, chosen: Path) -> bool:
    with contextlib.suppress(ValueError, KeyError, UnicodeDecodeError):
        return sign_again(case / "spoiled", case / "spoiled" / chosen)
    return False


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _import_everything() -> None:
    """Import what commands import when they begin, so that every child has it."""
    for name in (
        "zarr",
        "numcodecs",
        "pyarrow.parquet",
        "pyarrow.compute",
        "pydantic",
        "torch",
        "pipeline.cli",
    ):
        importlib.import_module(name)
    for package in ("pipeline.operations", "train.report", "train.engine"):
        folder = Path(importlib.import_module(package).__path__[0])
        for module in sorted(folder.glob("[a-z]*.py")):
            importlib.import_module(f"{package}.{module.stem}")
    _run_commands(RUN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _import_everything()
    root = tmp_path_factory.mktemp("corpus")
    log = root.parent / "corpus.log"
    # In a child, so that no thread of a library runs where children are forked.
    assert in_child(lambda: build_corpus(root), log) == 0, log.read_text()
    return root


def test_a_few_spoiled_files_are_refused_in_one_line(tmp_path, corpus):
    wrong = fuzz(tmp_path, corpus, range(20))
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_spoiled_files_are_refused_in_one_line(tmp_path, corpus, part):
    wrong = fuzz(tmp_path, corpus, range(20 + 100 * part, 120 + 100 * part))
    assert not wrong, "\n\n".join(wrong)
