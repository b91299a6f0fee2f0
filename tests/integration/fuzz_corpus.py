"""What the fuzz test spoils: one folder of each kind of thing that commands read, made by the commands themselves."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from shards import StoreWriter
from shards.formats import FORMATS
from shards.testing.contract import StoreKind, build_store, make_code, make_plan, make_recipe, write_shard
from shards.writing.added_fields import publish_fields

RUN = Path(__file__).parent.parent / "fixtures" / "runs" / "decoder"

KINDS = {
    "zarr": StoreKind(
        num_images=7, num_shards=2, compression="blosc", image_compression="zstd", class_token=True
    ),
    "webdataset": StoreKind(num_images=7, num_shards=2, format="webdataset", bad={3: "not an image"}),
    "int8": StoreKind(num_images=7, num_shards=2, dtype="int8", image_size=0),
    "unfinished": StoreKind(num_images=7, num_shards=3, dtype="int8", views=("center",)),
}
"""Stores that are written row by row; `encoded`, `extended` and `begun` are written by `pipeline`."""
assert {kind.format for kind in KINDS.values()} == set(FORMATS)

ENCODER = (
    *(
        "--encoder",
        "test_vit",
        "--weights",
        "random:0",
        "--input-size",
        "32",
        "--image-size",
        "32",
        "--views",
        "center",
    ),
    *("--encoder-args", "patch_size=8", "--batch-size", "4", "--max-bad", "100"),
)
"""16 tokens of width 64 an image, in a moment."""

HALF = "--model.{0}.width 16 --model.{0}.depth 1 --model.{0}.num-heads 2 --model.{0}.mlp-width 16"
TRAINERS = {
    "dit": "dit-dh-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.head-width 24"
    " --model.head-depth 1 --model.head-num-heads 2",
    "decoder": "decoder-tiny --model.width 16 --model.depth 1 --model.num-heads 2 --model.mlp-width 16",
    "compressor": f"flat-tiny --model.num-latents 3 --model.latent-width 4 {HALF.format('encoder')} "
    f"{HALF.format('decoder')}",
}
TRAINING = "--global-batch-size 4 --seed 0 --log-every 1 --checkpoint-every 1 --tracker none --ema-rates 0.9"


def build_corpus(root: Path) -> None:
    """Write the corpus.

    Args:
        root: An empty folder.
    """
    _sources(root)
    for name, kind in KINDS.items():
        if name != "unfinished":
            build_store(root / name, kind)
    build_store(root / "int8/fields/other", StoreKind(num_images=7, num_shards=2, width=3, image_size=0))
    publish_fields(root / "int8")
    _unfinished(root / "unfinished", KINDS["unfinished"])
    _encoded_stores(root)
    shutil.copytree(RUN, root / "run")  # of an earlier version, without digests
    _networks(root)
    _evaluations(root)


def build_demo(root: Path) -> None:
    """Write what the demo's commands write, in little, and a few-step model with its teacher.

    Args:
        root: An empty folder.
    """
    from eval.few_step import main as few_step
    from eval.reconstruction import main as reconstruct

    _sources(source := root.parent / "demo's source")
    demo = root / "demo"
    store, run, teacher = demo / "store", demo / "dit", demo / "dit/snapshots/latest.safetensors"
    _must(pipeline("encode", source / "folder", "--out", store, "--shards", 2, *ENCODER))
    for logs in demo.glob("*.logs"):
        shutil.rmtree(logs)
    _must(train("decoder", store, out=demo / "decoder"))
    _must(train("dit", store, out=run))
    few = ("--objective", "mid-training", "--teacher", teacher, "--mid-training.pairs", 2)
    _must(train("dit", store, out=demo / "student", more=few))
    decoder = demo / "decoder/snapshots/latest.safetensors"
    _must(
        reconstruct(
            [str(store), "--decoder", str(decoder), "--out", str(demo / "reconstruction"), "--num", "6"]
        )
    )
    _must(generate(teacher, decoder, out=demo / "generation"))
    _must(few_step(few_step_arguments(demo, demo / "few-step")))


def few_step_arguments(demo: Path, out: Path) -> list[str]:
    """Return the arguments of eval/few_step.py over what `build_demo` wrote."""
    snapshot = "snapshots/latest.safetensors"
    files = {
        "teacher": demo / "dit" / snapshot,
        "decoder": demo / "decoder" / snapshot,
        "store": demo / "store",
    }
    more = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return [
        str(demo / "student" / snapshot),
        "--out",
        str(out),
        "--num-samples",
        "3",
        "--columns",
        "3",
        *more,
    ]


def pipeline(*arguments: object) -> int:
    """Run `pipeline` in this process; returns the exit code."""
    from pipeline.cli import main

    return main([str(argument) for argument in arguments])


def train(trainer: str, *stores: Path, out: Path, steps: int = 1, more: tuple[object, ...] = ()) -> int:
    """Run a trainer in this process; returns the exit code, or raises `UserError`."""
    from train import compressor, decoder, dit

    main = {"dit": dit.main, "decoder": decoder.main, "compressor": compressor.main}[trainer]
    arguments = [*TRAINERS[trainer].split(), *TRAINING.split(), "--max-steps", str(steps), "--out", str(out)]
    return main([*arguments, "--store", *map(str, stores), *map(str, more)])


def generate(dit: Path, decoder: Path, *more: object, out: Path) -> int:
    """Run `eval/generation.py` in this process; returns the exit code, or raises `UserError`."""
    from eval.generation import main

    sizes = ("--num-samples", "4", "--points", "3", "--batch-size", "2")
    return main([str(dit), "--decoder", str(decoder), "--out", str(out), *sizes, *map(str, more)])


def _must(code: int) -> None:
    assert code == 0, f"a part of the corpus ended with {code}"


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


def _encoded_stores(root: Path) -> None:
    """A store; one that was extended; one of which a shard is missing again."""
    _must(pipeline("encode", root / "folder", "--out", root / "encoded", "--shards", 2, *ENCODER))
    fewer = root.parent / "fewer images"
    shutil.copytree(root / "folder", fewer, ignore=shutil.ignore_patterns("4.*", "5.*"))
    _must(pipeline("encode", fewer, "--out", root / "extended", "--shards", 2, *ENCODER))
    _must(pipeline("extend", root / "extended", root / "folder"))
    _must(pipeline("encode", root / "folder", "--out", root / "begun", "--shards", 3, *ENCODER))
    shard = root / "begun/center/tokens/c/1/0/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    _must(pipeline("verify", root / "begun", "--withdraw"))
    for logs in root.glob("*.logs"):
        shutil.rmtree(logs)


def _networks(root: Path) -> None:
    """A run, the snapshots of three kinds of networks, and the files that others publish."""
    import torch
    from safetensors.torch import save_file

    from eval.export import main as export
    from pipeline.encoders.encoder import create_encoder

    snapshots, published, runs = root / "snapshots", root / "published", root.parent / "runs"
    snapshots.mkdir()
    for trainer in TRAINERS:
        _must(train(trainer, root / "encoded", out=runs / trainer))
        shutil.copy(runs / trainer / "snapshots/latest.safetensors", snapshots / f"{trainer}.safetensors")
    shutil.copytree(runs / "dit", root / "trained")
    for name in ("dit", "decoder"):
        _must(export(["--snapshot", str(snapshots / f"{name}.safetensors"), "--out", str(published)]))
    encoder = create_encoder("test_vit", "random:0", input_size=32, model_args={"patch_size": 8})
    weights = {name: value.clone() for name, value in encoder.trunk.state_dict().items()}
    torch.save({"model": weights}, published / "encoder.pt")
    save_file(weights, published / "encoder.safetensors")


def _evaluations(root: Path) -> None:
    """Samples that are whole, samples that are not, and statistics to compare them with."""
    from eval.images.samples import SamplesFile
    from eval.metrics.moments import Gaussian
    from eval.metrics.reference_file import SavedStatistics, write_statistics

    snapshots = root / "snapshots"
    _must(generate(snapshots / "dit.safetensors", snapshots / "decoder.safetensors", out=root / "generation"))
    shutil.copytree(root / "generation", root / "trained/generation")
    (root / "sampling").mkdir()
    shutil.copy(root / "generation/generation.json", root / "sampling")
    samples = SamplesFile(root / "sampling/samples.npz", 4, (32, 32))
    samples.create()
    with np.load(root / "generation/samples.npz") as whole, samples:
        samples.write([0, 2], whole["arr_0"][[0, 2]])
    gaussian = Gaussian(mean=np.arange(6.0), covariance=np.eye(6), count=None)
    saved = SavedStatistics(
        gaussians={"pool": gaussian, "spatial": gaussian},
        manifold=np.ones((5, 6), np.float32),
        network="0" * 64,
        kind="folder",
        count=5,
    )
    write_statistics(root / "published/reference.npz", {"inception": saved})


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
