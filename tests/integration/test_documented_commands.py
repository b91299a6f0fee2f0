"""Every command of README and docs is read by the program it names; but for a declared few, they also run.

Commands are the lines of fenced ``sh`` blocks. The running tests belong to `make test-slow`; what they change in a
command, to make it small or to do without a cluster, is in the tables below and nothing else.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import eval.command
import train.compare
import train.settings.commandline
import train.verify
from eval.settings import AssessSettings, FewStepSettings, GenerationSettings, ReconstructionSettings
from pipeline import cli
from shards.storage.location import as_location, publish_bytes
from shards.testing.contract import StoreKind, build_store
from train.settings.compressor_presets import COMPRESSOR_DEFAULT, compressor_settings
from train.settings.presets import DECODER_DEFAULT, DIT_DEFAULT, decoder_settings, dit_settings
from train.settings.saved_settings import to_json

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
]
LANGUAGES = {"sh", "text", "python", "json"}

TINY = "--encoder test_vit --input-size 32 --image-size 32 --encoder-args patch_size=8"
SMALLER = [
    (r"^accelerate launch ", "python "),
    (r"(train/decoder\.py) (raev2-)?decoder-\S+", r"\1 decoder-tiny"),
    (r"(train/dit\.py) raev2-\S+", r"\1 raev2-tiny --views center"),
    (r"--layers \S+", "--layers 1,3,5"),
    (r"--also k1=23 k23=1-23", "--also k1=5 k23=1-5"),
    (r" --features cls\b", ""),
    (r"--row \d+", "--row 0"),
    (r"(train/dit\.py) dit-(?:\S+(-(?:cmt|mfd|mft))\b|\S+)", r"\1 dit-dh-tiny\2"),
    (r"^(python eval/few_step\.py .*)", r"\1 --num-samples 16"),
    (r"(train/compressor\.py) flat-\S+", r"\1 flat-tiny"),
    (r"^(python train/.*)", r"\1 --max-steps 2 --global-batch-size 8 --tracker none"),
    (r"--num-samples 50000", "--num-samples 6 --points 4"),
    (r"^(pipeline reshard .*)--shards \d+", r"\1--shards 2"),
    (r"--shards \d\d+", "--shards 4"),
    (r"--sample 50000", "--sample 6"),
    (r"--every 10\b", "--every 2"),
    (
        r"^(pipeline encode .*)--encoder vit_base_patch16_siglip_256\.v2_webli",
        rf"\1{TINY} --weights random:1",
    ),
    (
        r"^(pipeline add-field .*)--encoder \S+",
        rf"\1{TINY.replace('--image-size 32 ', '')} --weights random:1",
    ),
    (r"^(pipeline encode (?!.*test_vit).*?)( >.*)?$", rf"\1 {TINY} --weights random:0\2"),
    (r"psnr ssim rfid", "psnr ssim"),
    (r"^(pipeline assess .*)", r"\1 --rows 8"),
    (r"^(pipeline convert .*--dtype int8)", r"\1 --calibration-rows 8 --allow-error 1"),
    (r"--devices cuda:0,cuda:1", "--devices cpu,cpu"),
    (r"--ray-address auto", "--ray-actors 1"),
    (r"^rsync -a data/store/ other:/data/store/", "cp -r data/store moved"),
    (r" /data/store$", " moved"),
    (r"s3://bucket/", "s3://latents/documented/"),
    (r"--cache /scratch/latents --cache-bytes 600000000000", "--cache cache --cache-bytes 1000000"),
]
"""What is changed before a command is run, in this order."""

PLACES = {
    "SOURCE": "data/imagenet/train",
    "STORE": "data/store",
    "OTHER": "data/other",
    "(?<=--decoder )SNAPSHOT": "runs/decoder/snapshots/latest.safetensors",
    "SNAPSHOT": "runs/dit/snapshots/latest.safetensors",
    "RUN": "runs/decoder",
    "NEW": "new-{number}",
    "DIR": "new-{number}",
}
"""What the words of the reference pages represent."""

NOT_RUN = {
    "make": "the demo has a slow test of its own, and the tests are what is running",
    "pip": "installs",
    "sbatch": "needs SLURM",
    "model.pt": "needs published weights; tests/eval/test_published.py reads such files",
    "--protocol": "needs Inception's public weights; tests/eval/test_generation.py runs protocols with others",
    "--fid-every": "needs Inception's public weights; tests/train/test_train_fid.py measures with others",
}
"""Word of a command, and why a command with that word is read but not run."""


def sections_of(page):
    """Text by heading; what comes before the first one is under the page's own name."""
    top, *parts = re.split(r"^## (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return {page: top, **dict(zip(parts[::2], parts[1::2], strict=True))}


def commands_in(text):
    """The commands of a text, one line each."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+#.*$|^#.*$", "", line).strip() for line in lines]
    return [re.sub(r"\s+", " ", line) for line in found if line]


DOCUMENTED = [(page, line) for page in PAGES for line in commands_in((ROOT / page).read_text())]


def read(words):
    """Give a command to the parser of the program it names; fails for programs nobody has declared."""
    words = words[: words.index(">")] if ">" in words else words
    program, *rest = words
    if program == "pipeline" and rest[0] in cli.PROGRAMS:
        assert rest[0] == "assess", words
        eval.command.parse(rest[1:], AssessSettings, "pipeline assess", flags=True)
    elif program == "pipeline":
        cli.parse(rest)
    elif program == "accelerate":
        assert rest[0] == "launch", words
        read_script(rest[1:])
    elif program in ("python", "sbatch"):
        if program == "sbatch" and rest == ["encode.sbatch"]:  # written by the command before it
            return
        if program == "sbatch":
            assert (ROOT / rest.pop(0)).is_file(), words
        read_script(rest)
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        assert all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            for target in targets
        )
    elif program == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra
    else:
        assert program == "rsync", f"nothing is known of {program}"


def read_script(words):
    if words[0] == "-m":
        words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if script == "train/dit.py":
        train.settings.commandline.parse_runs(
            rest, preset=dit_settings, default=DIT_DEFAULT, script=script, presets=""
        )
    elif script == "train/compressor.py":
        train.settings.commandline.parse_runs(
            rest, preset=compressor_settings, default=COMPRESSOR_DEFAULT, script=script, presets=""
        )
    elif script == "train/decoder.py":
        train.settings.commandline.parse_runs(
            rest, preset=decoder_settings, default=DECODER_DEFAULT, script=script, presets=""
        )
    elif script == "eval/generation.py":
        eval.command.parse(rest, GenerationSettings, script)
    elif script == "eval/reconstruction.py":
        eval.command.parse(rest, ReconstructionSettings, script)
    elif script == "eval/few_step.py":
        eval.command.parse(rest, FewStepSettings, script)
    elif script == "train/compare.py":
        train.compare.parse(rest)
    elif script == "train/verify.py":
        train.verify.parse(rest)
    else:
        raise AssertionError(f"nothing is known of {script}")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_holds(page):
    fences = re.findall(r"^```(.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES, fences[::2]


@pytest.mark.parametrize("page", PAGES)
def test_every_program_is_valid_python(page):
    for number, program in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.M)
    ):
        compile(program, f"{page}, program {number}", "exec")


@pytest.mark.parametrize(
    ("page", "line"), DOCUMENTED, ids=[f"{page}: {line[:60]}" for page, line in DOCUMENTED]
)
def test_every_command_is_read_by_its_program(page, line, tmp_path, monkeypatch):
    # A reference that an FID is measured against has to be there when settings are read.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/VIRTUAL_imagenet256_labeled.npz").touch()
    # So have the settings of a run that another one varies.
    for run in ("runs/dit", "runs/dit/seed-0"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text(to_json(dit_settings("dit-dh-b-256")))
    monkeypatch.chdir(tmp_path)
    read(shlex.split(line))


@pytest.mark.parametrize(
    ("target", "programs"),
    [
        (
            "demo",
            {
                *("encode", "verify", "train/decoder.py", "train/dit.py"),
                *("eval/reconstruction.py", "eval/generation.py"),
            },
        ),
        ("demo-few-step", {"train/dit.py", "eval/few_step.py"}),
    ],
)
def test_every_command_of_the_demo_is_read_by_its_program(target, programs):
    printed = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    read_lines = set()
    for line in printed.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        script = next((word for word in words if re.match(r"(train|eval)/\w+\.py$", word)), None)
        if script is not None:
            read_script(words[words.index(script) :])
            read_lines.add(script)
        elif words and words[0].endswith("bin/pipeline"):
            read(["pipeline", *words[1:]])
            read_lines.add(words[1])
    assert read_lines >= programs


@pytest.mark.parametrize(
    "line",
    [
        "pipeline encode images --out store --shards four",
        "pipeline frobnicate",
        "cp -r a b",
        "python train/gan.py",
    ],
)
def test_a_command_that_is_wrong_is_noticed(line):
    with pytest.raises((SystemExit, AssertionError)):
        read(shlex.split(line))


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """What the commands expect to find: pictures, stores, trained networks, published statistics, a list of keys."""
    folder = tmp_path_factory.mktemp("ground")
    generator = np.random.default_rng(0)
    classes = ("n01440764", "n01443537", "n02085620", "n02085782", "n02085936")
    for place, names in {
        "data/imagenet/train": classes,
        "data/imagenet/val": classes,
        "photos": ("me", "you"),
        "photos-2027": ("me", "you"),
    }.items():
        for name in names:
            (folder / place / name).mkdir(parents=True)
            for number in range(5):
                values = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(values).save(folder / place / name / f"{place[-3:]}{number}.png")
    torch.save({"mean": None, "var": torch.ones(64, 4, 4)}, folder / "stat.pt")
    (folder / "keys.txt").write_text("n01440764/ain0.png\nn02085620/ain3.png\n")
    for line in (
        "pipeline encode data/imagenet/train --out data/store --shards 4",
        "pipeline encode data/imagenet/val --out data/other --shards 4",
        "accelerate launch train/decoder.py decoder-xl --store data/store --out runs/decoder",
        "accelerate launch train/dit.py dit-dh-xl-256 --store data/store --out runs/dit",
        "accelerate launch train/compressor.py flat-32x128 --store data/store --out runs/flat",
    ):
        run(smaller(line), folder)
    return folder


def _left_out(line):
    return any(word in NOT_RUN for word in shlex.split(line))


def smaller(line, number=0):
    """The command as it is run, by the tables above; `number` tells it from others of its section."""
    for word, place in PLACES.items():
        line = re.sub(rf"\b{word}\b", place.format(number=number), line)
    for pattern, replacement in SMALLER:
        line = re.sub(pattern, replacement, line)
    return line


def run(line, cwd, *, exit_codes=(0,)):
    """Run a command line; the repository's scripts are given by their paths in it."""
    line = re.sub(r"^python (\w+/)", rf"python {ROOT}/\1", line)
    line = re.sub(r"^(pipeline|python)\b", rf"{BIN}/\1", line)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in exit_codes, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


RUN = [
    (page, heading)
    for page in PAGES
    for heading, text in sections_of(page).items()
    if any(not _left_out(line) for line in commands_in(text))
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "heading"), RUN, ids=[f"{page}: {heading}" for page, heading in RUN])
def test_the_commands_of_a_section_run_one_after_another(ground, tmp_path, page, heading, request):
    folder = tmp_path / "section"
    shutil.copytree(ground, folder)
    lines = commands_in(sections_of(page)[heading])
    if any("s3://" in line for line in lines):
        request.getfixturevalue("s3_environment")
        for picture in (folder / "photos").rglob("*.png"):
            name = picture.relative_to(folder / "photos").as_posix()
            publish_bytes(as_location("s3://latents/documented/photographs") / name, picture.read_bytes())
    for line in lines:
        # What a section makes from its beginning is not there before it; a retry repairs what is.
        if re.search(r"^pipeline encode (?!.*--retry)|^accelerate launch train/", line):
            shutil.rmtree(folder / line.partition("--out ")[2].split()[0], ignore_errors=True)
    for number, line in enumerate(lines):
        if not _left_out(line):
            run(smaller(line, number), folder, exit_codes=(0, 1) if "pipeline diff" in line else (0,))


def snippet(page, number=0):
    """A block of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)[
        number
    ]


def test_the_loop_of_the_loading_page_runs(tmp_path):
    build_store(tmp_path / "store", StoreKind())
    seen = []

    class EnoughError(Exception):
        pass

    def train_step(tokens, labels):
        seen.append((tokens.shape, labels.shape))
        if len(seen) == 3:
            raise EnoughError

    source = snippet("docs/loading.md").replace("data/store", str(tmp_path / "store"))
    with pytest.raises(EnoughError):
        exec(source, {"train": train_step})
    assert seen == [((128, 6, 5), (128,))] * 3


def test_a_stock_reader_decodes_int8_by_the_page_s_two_lines(tmp_path):
    store = build_store(tmp_path / "store", StoreKind(dtype="int8"))
    names = {"zarr": zarr, "np": np, "D": store.width, "row": 3}
    exec(snippet("docs/quantisation.md").replace("STORE", str(store.path)), names)
    reader = store.reader("center", "tokens")
    stored = np.empty((1, *reader.row_shape), reader.dtype)
    reader.read([3], stored)
    assert np.array_equal(names["tokens"], store.decode(stored)[0])
