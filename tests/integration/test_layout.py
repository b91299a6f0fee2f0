"""The four package names are ours, nothing shadows anything, and --help is quick because it loads no torch."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS as COMMAND_TABLE
from pipeline.cli import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "train", "eval", "shards")
COMMANDS = {
    "pipeline": "from pipeline.cli import main",
    "train/dit.py": "from train.dit import main",
    "train/decoder.py": "from train.decoder import main",
    "train/compressor.py": "from train.compressor import main",
    "eval/generation.py": "from eval.generation import main",
    "eval/few_step.py": "from eval.few_step import main",
    "eval/reconstruction.py": "from eval.reconstruction import main",
    "eval/reference_statistics.py": "from eval.reference_statistics import main",
    "eval/assess.py": "from eval.assess import main",
    "eval/export.py": "from eval.export import main",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_of_this_name_is_this_repository_s(name):
    assert importlib.import_module(name).__file__ == str(ROOT / name / "__init__.py")


@pytest.mark.parametrize("folder", ["train", "eval"])
def test_no_script_folder_holds_a_module_named_like_another(folder):
    # `accelerate launch train/dit.py` puts train/ first on sys.path: such a module would be imported by everybody.
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - set(PACKAGES)
    mine = {path.stem for path in (ROOT / folder).iterdir()} - {"__init__", "__pycache__"}
    assert not mine & taken


@pytest.mark.parametrize(
    ("package", "modules"), {"shards": 8, "train": 10, "eval": 12, "pipeline": 12}.items()
)
def test_a_package_is_a_handful_of_rooms_and_the_readme_has_a_line_for_each(package, modules):
    rooms = sorted(path.parent.name for path in (ROOT / package).glob("*/__init__.py"))
    assert len(rooms) <= 10
    assert len(list((ROOT / package).glob("*.py"))) <= modules
    tree = re.search(
        rf"^{package}/ .*?(?=^\S)", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert sorted(re.findall(r"^  (\w+)/ +\S", tree[0], flags=re.MULTILINE)) == rooms


def test_the_architecture_page_shows_the_layers_that_import_linter_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = re.sub(r"\s+", " ", (ROOT / "ARCHITECTURE.md").read_text())
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}
    assert layers.keys() == set(PACKAGES)
    for package, lines in layers.items():
        assert f"{package} {' > '.join(lines)}".replace(" : ", ", ") in page, package


def test_no_folder_of_tests_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_torch_and_no_other_heavy_library(command):
    script = f"""
import sys
{COMMANDS[command]}
try:
    main(["--help"]) if {command != "pipeline"} else main(["encode", "--help"])
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "timm", "zarr", "pyarrow", "pydantic", "accelerate", "webdataset"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_pipeline_sets_how_threads_wait_before_torch_is_loaded_and_leaves_what_was_set():
    script = (
        "import os\n"
        "from pipeline.cli import main\n"
        "assert main(['inspect', '/does/not/exist']) == 2\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, kept in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if given is not None:
            environment["OMP_WAIT_POLICY"] = given
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == kept


def test_every_subcommand_of_pipeline_names_a_function_or_a_program():
    for command in COMMAND_TABLE:
        if command.name in PROGRAMS:
            assert find_spec(PROGRAMS[command.name])
        else:
            module, _, name = command.function.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_importing_the_pipeline_command_loads_no_torch():
    script = "import sys; import pipeline.cli, pipeline.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
