"""Everything that reads what the fuzz test spoils, and what it must give if it ends well."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_corpus import ENCODER, KINDS, few_step_arguments, generate, pipeline, train

from shards import StoreWriter, decode_image, find_images, open_store, verify_store
from shards.testing.contract import StoreKind, make_code, make_plan, make_recipe, write_shard

STORES = (*KINDS, "encoded", "extended", "begun")
BEGUN = ("unfinished", "begun")
"""Stores that are not finished."""
SOURCES = ("folder", "tar", "webdataset source", "parquet", "table")


@dataclass(frozen=True)
class Command:
    """Something that reads a folder.

    Attributes:
        run: Runs it; returns the exit code, None for 0, or raises `UserError`.
        writes: Whether it changes the folder, so that what is run after it may give something else.
        ends: Its exit code for what is whole.
        result: Gives what it has given, once it has ended well; None where no two runs need give the same.
    """

    run: Callable[[], Any]
    writes: bool = False
    ends: int = 0
    result: Callable[[], str | None] = lambda: None


def commands_of(name: str, path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    """Everything that reads a folder of the corpus.

    Args:
        name: The kind of the folder.
        path: The folder, which may be spoiled.
        corpus: The corpus, which is whole.
        out: A folder for what commands write.
    """
    if name in SOURCES:
        return _of_source(path / "images.csv" if name == "table" else path, out)
    if name in STORES:
        return _of_store(name, path, corpus, out)
    return {
        "run": _of_run,
        "trained": _of_trained,
        "snapshots": _of_snapshots,
        "published": _of_published,
        "generation": _of_samples,
        "sampling": _of_samples,
        "demo": _of_demo,
    }[name](path, corpus, out)


def digest(*values: bytes) -> str:
    """SHA-256 of some bytes."""
    return hashlib.sha256(b"".join(values)).hexdigest()


def rows_of(path: Path) -> str | None:
    """Digest of everything that a trainer takes from a store; None for one that `verify` finds damaged."""
    if verify_store(path):
        return None
    opened = open_store(path)
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
    return digest(*(np.ascontiguousarray(values).tobytes() for values in found.values()))


def read_again(path: Path) -> str | None:
    """The same, of rows as they are read, whatever `verify` says."""
    opened = open_store(path)
    views = [(view, field) for view in opened.views for field in opened.recipe.fields(view)]
    for view, field in views:
        reader = opened.reader(view, field)
        reader.read(opened.valid_rows, np.zeros((len(opened.valid_rows), *reader.row_shape), reader.dtype))
    return None


def weights_of(out: Path) -> str:
    """Digest of the newest checkpoint's network."""
    from train.engine.checkpoint import checkpoints

    return digest((checkpoints(out / "checkpoints")[-1] / "model.safetensors").read_bytes())


def _samples(out: Path) -> str:
    with np.load(out / "samples.npz") as archive:
        return digest(archive["arr_0"].tobytes())


def _of_source(path: Path, out: Path) -> dict[str, Command]:
    def whole() -> None:
        assert not verify_store(out / "store"), "what was encoded is damaged"

    roots = ("--source", path if path.is_dir() else path.parent.parent)
    return {
        "list and read": Command(lambda: _read_source(path)),
        "encode": Command(
            lambda: pipeline("encode", path, *roots, "--out", out / "store", "--shards", 2, *ENCODER),
            result=whole,
        ),
    }


def _read_source(path: Path) -> None:
    from shards import BadImageError, SourceReader, SourceRoots, UndecodableImageError

    found = find_images(str(path))
    with SourceReader(
        found.archives, SourceRoots.of([str(path.parent.parent if path.suffix else path)])
    ) as reader:
        for image in found.images:
            with contextlib.suppress(BadImageError, UndecodableImageError):
                decode_image(reader.read(image, any_size=True))


def _of_store(name: str, path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    def rows() -> str | None:
        return rows_of(path)

    ends = 1 if name in BEGUN else 0
    commands = {
        "verify": Command(lambda: pipeline("verify", path), ends=ends),
        "inspect": Command(lambda: pipeline("inspect", path, "--json")),
        "clean": Command(lambda: pipeline("clean", path, "--wait", 0), writes=True),
        "withdraw": Command(lambda: pipeline("verify", path, "--withdraw", "--wait", 0), writes=True),
        "give up": Command(lambda: pipeline("clean", path, "--wait", 0, "--give-up"), writes=True, ends=ends),
        "report": Command(lambda: pipeline("report", path, "--out", out / "page.html")),
    }
    if name in KINDS:
        commands["continue"] = Command(lambda: _continue(path, KINDS[name]), writes=True, result=rows)
    else:
        commands |= _of_encoded(name, path, corpus, rows)
    if name not in BEGUN:
        commands |= _of_finished(name, path, corpus, out)
    return commands


def _continue(path: Path, kind: StoreKind) -> None:
    plan = make_plan(kind)
    writer = StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan, make_code(kind))
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=kind.bad)
    writer.finalize()


def _of_encoded(name: str, path: Path, corpus: Path, rows: Callable[[], str | None]) -> dict[str, Command]:
    """What a store that `pipeline encode` wrote is written with again."""
    source, shards = corpus / "folder", 3 if name == "begun" else 2
    commands = {
        "encode": Command(
            lambda: pipeline("encode", source, "--out", path, "--shards", shards, *ENCODER),
            writes=True,
            ends=1 if name == "extended" else 0,
            result=rows,
        )
    }
    if name == "begun":
        return commands
    views, roots = ("add-view", path, "--views"), ("--source", source)
    field = ("add-field", path, "--name", "flat", "--untrained")
    compressor = corpus / "snapshots/compressor.safetensors"
    return commands | {
        "extend": Command(lambda: pipeline("extend", path, source), writes=True, result=rows),
        "add a view": Command(lambda: pipeline(*views, "flip"), writes=True, result=rows),
        "add crops": Command(lambda: pipeline(*views, "crop:1", *roots), writes=True, result=rows),
        "add a field": Command(
            lambda: pipeline(*field, "--compressor", compressor),
            writes=True,
            result=lambda: rows_of(path / "fields/flat"),
        ),
    }


def _of_finished(name: str, path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    other = "zarr" if name == "webdataset" else "webdataset"
    decoder = corpus / "snapshots/decoder.safetensors"
    commands = {
        "read": Command(lambda: read_again(path), result=lambda: rows_of(path)),
        "follow": Command(lambda: pipeline("verify", path, "--follow-links")),
        "stats": Command(lambda: pipeline("stats", path)),
        "convert": Command(
            lambda: pipeline("convert", path, "--out", out / "copy", "--format", other),
            result=lambda: rows_of(out / "copy"),
        ),
        "diff": Command(lambda: pipeline("diff", path, path)),
        "subset": Command(
            lambda: pipeline("subset", path, "--out", out / "subset", "--sample", 3, "--shards", 1),
            result=lambda: rows_of(out / "subset"),
        ),
        "reshard": Command(
            lambda: pipeline("reshard", path, "--out", out / "resharded", "--shards", 1),
            result=lambda: rows_of(out / "resharded"),
        ),
        "train": Command(lambda: train("dit", path, out=out / "dit"), result=lambda: weights_of(out / "dit")),
        "mixture": Command(
            lambda: train("dit", path, corpus / name, out=out / "mixed"),
            result=lambda: weights_of(out / "mixed"),
        ),
    }
    if name not in KINDS:
        commands |= {
            "train a decoder": Command(lambda: train("decoder", path, out=out / "decoder")),
            "reconstruct": Command(lambda: _reconstruct(path, decoder, out), result=lambda: _scores(out)),
            "assess": Command(lambda: _assess(path, decoder)),
            "neighbours": Command(
                lambda: pipeline("neighbours", path, "--row", 0, "--out", out / "neighbours.html")
            ),
        }
    return commands


def _reconstruct(store: Path, decoder: Path, out: Path, *more: object) -> int:
    from eval.reconstruction import main

    return main(
        [str(store), "--decoder", str(decoder), "--out", str(out / "reconstruction"), *map(str, more)]
    )


def _scores(out: Path) -> str:
    results = json.loads((out / "reconstruction/results.json").read_text())
    return digest(json.dumps([results["psnr"], results["ssim"]]).encode())


def _assess(store: Path, decoder: Path) -> int:
    from eval.assess import main

    return main([str(store), "--decoder", str(decoder)])


def _of_run(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from train.engine.checkpoint import checkpoints, prune, read_part, read_state, require_intact
    from train.report.metrics_file import read_metrics
    from train.settings.saved_settings import load_settings
    from train.weights.snapshot import load_snapshot

    def resume() -> None:
        load_settings(path / "config.json")
        read_metrics(path / "metrics.jsonl")
        for checkpoint in checkpoints(path / "checkpoints"):
            state = read_state(checkpoint)
            require_intact(checkpoint, state)
            for part in state.files:
                read_part(checkpoint, part.removesuffix(".safetensors"))

    return {
        **_of_any_run(path, corpus, out),
        "resume": Command(resume),
        "load": Command(lambda: load_snapshot(path / "snapshots/latest.safetensors") and None),
        "prune": Command(lambda: prune(path / "checkpoints", 1), writes=True),
    }


def _of_any_run(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from train.compare import main as compare
    from train.verify import main as verify

    page = ("--out", str(out / "comparison.html"))
    return {
        "verify": Command(lambda: verify([str(path)])),
        "compare": Command(lambda: compare([str(path), str(corpus / "trained"), *page])),
        "compare alone": Command(lambda: compare([str(path), *page])),
        "compare results": Command(
            lambda: compare([str(corpus / "trained"), *page, "--results", str(path / "generation")])
        ),
    }


def _of_trained(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    snapshot, decoder = path / "snapshots/latest.safetensors", corpus / "snapshots/decoder.safetensors"
    return {
        **_of_any_run(path, corpus, out),
        "train on": Command(
            lambda: train("dit", corpus / "encoded", out=path, steps=2),
            writes=True,
            result=lambda: weights_of(path),
        ),
        "generate": Command(
            lambda: generate(snapshot, decoder, out=out / "samples"), result=lambda: _samples(out / "samples")
        ),
    }


def _of_snapshots(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from eval.export import main as export
    from train.verify import main as verify

    dit, decoder, compressor = (path / f"{name}.safetensors" for name in ("dit", "decoder", "compressor"))
    store = corpus / "encoded"

    def export_both() -> None:
        for snapshot in (dit, decoder):
            export(["--snapshot", str(snapshot), "--out", str(out / "published")])

    return {
        "verify": Command(lambda: verify([str(dit), str(decoder), str(compressor)])),
        "generate": Command(
            lambda: generate(dit, decoder, out=out / "samples"), result=lambda: _samples(out / "samples")
        ),
        "reconstruct": Command(lambda: _reconstruct(store, decoder, out), result=lambda: _scores(out)),
        "reconstruct latents": Command(lambda: _reconstruct(store, decoder, out, "--compressor", compressor)),
        "export": Command(export_both),
        "start from": Command(
            lambda: train("dit", store, out=out / "dit", more=("--init-from", dit)),
            result=lambda: weights_of(out / "dit"),
        ),
        "distil": Command(
            lambda: train(
                "dit", store, out=out / "few", more=("--objective", "mid-training", "--teacher", dit)
            )
        ),
        "add a field": Command(
            lambda: _add_field(store, compressor, out), result=lambda: rows_of(out / "store/fields/flat")
        ),
    }


def _add_field(store: Path, compressor: Path, out: Path) -> int:
    import shutil

    shutil.copytree(store, out / "store", dirs_exist_ok=True)
    return pipeline("add-field", out / "store", "--name", "flat", "--compressor", compressor, "--untrained")


def _of_published(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from eval.metrics.reference_file import holds_statistics, read_statistics

    store = corpus / "encoded"

    def statistics() -> None:
        holds_statistics(path / "reference.npz")
        read_statistics(path / "reference.npz", {"pool", "spatial"})

    def begin(trainer: str, *more: object) -> int:
        return train(trainer, store, out=out / trainer, more=more)

    def encode(weights: str) -> int:
        other = [weights if word == "random:0" else word for word in map(str, ENCODER)]
        return pipeline("encode", corpus / "folder", "--out", out / "store", "--shards", 1, *other)

    return {
        "train a decoder": Command(lambda: begin("decoder", "--init-from", path / "model.pt")),
        "train": Command(lambda: begin("dit", "--statistics", path / "stat.pt")),
        "encode": Command(lambda: encode(str(path / "encoder.pt"))),
        "encode with safetensors": Command(lambda: encode(str(path / "encoder.safetensors"))),
        "statistics": Command(statistics),
        "start from": Command(lambda: begin("dit", "--init-from", path / "stage2_model.pt")),
    }


def _of_samples(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from eval.images.samples import map_samples
    from train.compare import main as compare

    snapshots = corpus / "snapshots"
    page = ("--out", str(out / "comparison.html"))
    return {
        "go on": Command(
            lambda: generate(snapshots / "dit.safetensors", snapshots / "decoder.safetensors", out=path),
            writes=True,
        ),
        "look": Command(
            lambda: map_samples(path / "samples.npz").sum() and None,
            ends=0 if (path / "samples.npz").exists() else 1,
        ),
        "compare results": Command(lambda: compare([str(corpus / "trained"), *page, "--results", str(path)])),
    }


def _of_demo(path: Path, corpus: Path, out: Path) -> dict[str, Command]:
    from eval.few_step import main as few_step
    from pipeline.demo.page import DemoFolders, write_page

    def page() -> None:
        parts = ("store", "decoder", "dit", "reconstruction", "generation", "few_step")
        write_page(DemoFolders(**{part: path / part.replace("_", "-") for part in parts}), out / "page")

    def distances() -> str:
        rows = json.loads((out / "few-step/few-step.json").read_text())["rows"]
        return digest(json.dumps([row["distance"] for row in rows]).encode())

    return {
        "page": Command(page),
        "few steps": Command(lambda: few_step(few_step_arguments(path, out / "few-step")), result=distances),
    }
