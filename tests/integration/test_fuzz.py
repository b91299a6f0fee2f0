"""Stores, sources, runs, snapshots and samples with one file spoiled, against every command that reads them.

Each case runs in a child of its own, with a limit of memory and of time: it ends with 0 and right data, or with 1 or 2
and one line. Never with a traceback, and never with a touch of what is beside the folder.
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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fuzz_commands import BEGUN, STORES, Command, commands_of
from fuzz_corpus import build_corpus, build_demo

from shards import printable_text
from shards.command_line import run_command
from shards.metadata.commit import ObjectRecord
from shards.metadata.layout import MANIFEST

MEMORY = 3 << 30
"""Bytes a case may allocate beyond what the libraries hold when it begins."""
SECONDS = 60
"""A case that takes longer hangs; one takes a second or two on an idle machine."""


class _NotRightError(AssertionError):
    """A command has ended well with wrong data."""


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


def judge(
    name: str, case: Path, corpus: Path, choose: Callable[[list[str]], list[str]], *, comparable: bool
) -> None:
    """Run some of the commands on a folder, each on what the one before has left; raises what is wrong.

    Args:
        name: The kind of the folder, which is `case`/spoiled.
        case: Where the commands may write.
        corpus: What is whole.
        choose: Picks some of the commands.
        comparable: Whether a command that ends well must give what it gives for the whole.
    """
    commands = commands_of(name, case / "spoiled", corpus, case / "out")
    for command in choose(sorted(commands)):
        code, err = _run(command, commands[command])
        assert code in (0, 1, 2), f"{command} ended with {code}"
        if code:
            last = err.strip().split("\n")[-1].split("\r")[-1]
            assert last.startswith("error: ") or command in ("verify", "diff"), f"{command} says {last!r}"
            assert printable_text(last) == last
            assert len(last) < 2000, f"{command} says {len(last)} characters"
        elif comparable:
            result, wanted = commands[command].result(), expected_of(name, command, corpus)
            if None not in (result, wanted) and result != wanted:
                raise _NotRightError(f"{command} has given something else than of what is whole")
        comparable &= not commands[command].writes


def _run(name: str, command: Command) -> tuple[int, str]:
    """Exit code of a command, and what it says."""
    text = io.StringIO()
    began = time.monotonic()
    sys.stdout.write(f"--- {name}\n")
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(command.run, on_interrupt=lambda: "")
    sys.stdout.write(f"{text.getvalue()}\nended with {code} after {time.monotonic() - began:.1f} s\n")
    return code, text.getvalue()


def expected_of(name: str, command: str, corpus: Path) -> str | None:
    """What a command, which must end well, gives for a whole folder; found out once."""
    kept = corpus.parent / "expected" / f"{name} {command}.json"
    if not kept.exists():
        case = _case(corpus.parent / f"whole {name} {command}", name, corpus)
        found = commands_of(name, case / "spoiled", corpus, case / "out")[command]
        code, _ = _run(f"{command} on what is whole", found)
        assert code == found.ends, f"{command} ended with {code} on what is whole"
        result = found.result() if code == 0 else None
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result))
        shutil.rmtree(case)
    whole: str | None = json.loads(kept.read_text())
    return whole


def _case(case: Path, name: str, corpus: Path) -> Path:
    """A folder with a copy of a part of the corpus, and one to write into."""
    shutil.copytree(corpus / name, case / "spoiled")
    if name == "table":
        shutil.copytree(corpus / "folder", case / "folder")
    (case / "out").mkdir()
    return case


def fuzz(root: Path, corpus: Path, cases: range) -> list[str]:
    """Spoil and read; gives a line a case that went wrong."""
    files = {
        name: sorted(path for path in (corpus / name).rglob("*") if path.is_file() and path.name != ".lock")
        for name in sorted(path.name for path in corpus.iterdir())
    }
    precious = root / "precious"
    for name in ("00000.json", "shard-00001.json", "c/0/0/0", "zarr.json", "step-00000001/state.json"):
        (precious / name).parent.mkdir(parents=True, exist_ok=True)
        (precious / name).write_text("mine")
    before, whole = _listing(precious), _listing(corpus)
    wrong = []
    for number in cases:
        draw = random.Random(number)
        name = draw.choice(sorted(files))
        chosen = draw.choice(files[name]).relative_to(corpus / name)
        case = _case(root / f"case {number}", name, corpus)
        log = root / f"{number}.log"
        how = spoil(case / "spoiled" / chosen, precious, draw)
        finished = name in STORES and name not in BEGUN
        signed = finished and draw.random() < 0.5 and _signed(case, chosen)
        choose = partial(_some, draw)
        work = partial(judge, name, case, corpus, choose, comparable=not signed)
        code = in_child(work, log)
        text = log.read_text(errors="replace")
        if code != 0 or "Traceback" in text:
            ended = "hung" if code is None else f"ended with {code}"
            wrong.append(f"case {number}: {name}/{chosen}, {how}, signed {signed}: {ended}\n{text[-2500:]}")
        if _listing(precious) != before or _listing(corpus) != whole:
            wrong.append(f"case {number}: {name}/{chosen}, {how}: files outside were touched")
            break
        shutil.rmtree(case)
    return wrong


def _some(draw: random.Random, names: list[str]) -> list[str]:
    return draw.sample(names, min(len(names), 2))


def _signed(case: Path, chosen: Path) -> bool:
    with contextlib.suppress(ValueError, KeyError, UnicodeDecodeError):
        return sign_again(case / "spoiled", case / "spoiled" / chosen)
    return False


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Length and time of every file."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _import_everything() -> None:
    """Import what commands import when they begin, so that every child has it."""
    for name in (
        *(
            "zarr",
            "numcodecs",
            "pyarrow.parquet",
            "pyarrow.compute",
            "pydantic",
            "torch",
            "timm",
            "pipeline.cli",
        ),
        *("train.dit", "train.decoder", "train.compressor", "train.compare", "train.verify"),
        *("eval.generation", "eval.reconstruction", "eval.assess", "eval.export", "eval.few_step"),
        "pipeline.demo.page",
    ):
        importlib.import_module(name)
    for package in (
        *("pipeline.operations", "pipeline.encode", "pipeline.encoders", "pipeline.engines"),
        *("train.report", "train.engine", "train.tasks", "train.weights"),
        *("eval.generate", "eval.reconstruct", "eval.metrics", "eval.networks"),
    ):
        folder = Path(importlib.import_module(package).__path__[0])
        for module in sorted(folder.glob("[a-z]*.py")):
            if (package, module.stem) != ("pipeline.engines", "ray"):
                importlib.import_module(f"{package}.{module.stem}")


# Each test is a process of its own that has run no network yet: autograd's threads do not survive a fork.


CORPORA = {"everything": build_corpus, "demo": build_demo}
"""What is spoiled, each in a folder of its own; that of the demo came later, and would change the other's cases."""


def _corpus(root: Path) -> Path:
    """Return the corpus in a folder that has the name of one; it is made if it is not there."""
    corpus = root / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        # In a child, so that no thread of a library runs where children are forked.
        code = in_child(lambda: CORPORA[root.name](corpus), root / "corpus.log")
        assert code == 0, (root / "corpus.log").read_text()
    return corpus


def _spoiled(root: Path, folder: Path, first: int, end: int) -> None:
    wrong = fuzz(folder, _corpus(root), range(first, end))
    assert not wrong, "\n\n".join(wrong)


def _whole(root: Path) -> None:
    corpus = _corpus(root)
    for name in sorted(path.name for path in corpus.iterdir()):
        log = root / f"{name}.log"
        for command in sorted(commands_of(name, corpus / name, corpus, root)):
            assert in_child(partial(expected_of, name, command, corpus), log) == 0, log.read_text()


def _in_a_process(*arguments: object) -> None:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the corpora, each of which the first test of it makes."""
    return tmp_path_factory.mktemp("fuzz")


def test_a_few_spoiled_files_are_refused_in_one_line(tmp_path, root):
    _in_a_process(root / "everything", tmp_path, 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_every_command_ends_well_on_what_is_whole(root, corpus):
    _in_a_process(root / corpus)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_spoiled_files_are_refused_in_one_line(tmp_path, root, part):
    _in_a_process(root / "everything", tmp_path, 20 + 100 * part, 120 + 100 * part)


@pytest.mark.slow
def test_what_the_demo_has_left_is_refused_in_one_line_where_it_is_spoiled(tmp_path, root):
    _in_a_process(root / "demo", tmp_path, 0, 100)


if __name__ == "__main__":
    _import_everything()
    if len(sys.argv) == 2:
        _whole(Path(sys.argv[1]))
    else:
        _spoiled(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
