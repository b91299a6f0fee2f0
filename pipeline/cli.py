"""The `pipeline` command: a table of subcommands; what one needs is imported when it is called."""

import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from pipeline.cores import let_waiting_threads_sleep
from pipeline.settings.additions import AddFieldConfig, AddViewConfig, ExtendConfig
from pipeline.settings.config import EncodeConfig
from pipeline.settings.operations import (
    AssessConfig,
    CleanConfig,
    ConvertConfig,
    DiffConfig,
    EstimateConfig,
    InspectConfig,
    MergeConfig,
    NeighboursConfig,
    ProbeConfig,
    ReportConfig,
    ReshardConfig,
    StatsConfig,
    SubsetConfig,
    VerifyConfig,
)
from shards import run_command


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: What it is called by.
        settings: Its dataclass of settings; the docstrings are the help.
        function: `module:name` of what runs it: `function(settings)`, or `function(settings, arguments)` if engines may
            run it elsewhere. It returns the exit code, or None for 0.
        continues: Whether it does, run again, only what was not done before.
        runs_elsewhere: Whether engines may run it on other machines, with the same arguments.
    """

    name: str
    settings: type
    function: str
    continues: bool = False
    runs_elsewhere: bool = False

    def run(self, settings: Any, arguments: Sequence[str]) -> int:
        """Import the function and call it; returns the exit code."""
        module, _, name = self.function.partition(":")
        function = getattr(import_module(module), name)
        return (function(settings, arguments) if self.runs_elsewhere else function(settings)) or 0


_OPERATIONS = "pipeline.operations"

COMMANDS = (
    Command("encode", EncodeConfig, f"{_OPERATIONS}.encode:encode", continues=True, runs_elsewhere=True),
    Command("verify", VerifyConfig, f"{_OPERATIONS}.verify:verify"),
    Command("inspect", InspectConfig, f"{_OPERATIONS}.facts:inspect"),
    Command("report", ReportConfig, f"{_OPERATIONS}.report:report"),
    Command("convert", ConvertConfig, f"{_OPERATIONS}.convert:convert", continues=True),
    Command("reshard", ReshardConfig, f"{_OPERATIONS}.reshard:reshard", continues=True),
    Command("subset", SubsetConfig, f"{_OPERATIONS}.subset:subset", continues=True),
    Command("merge", MergeConfig, f"{_OPERATIONS}.merge:merge", continues=True),
    Command(
        "add-view", AddViewConfig, f"{_OPERATIONS}.add_view:add_view", continues=True, runs_elsewhere=True
    ),
    Command(
        "add-field", AddFieldConfig, f"{_OPERATIONS}.add_field:add_field", continues=True, runs_elsewhere=True
    ),
    Command("extend", ExtendConfig, f"{_OPERATIONS}.extend:extend", continues=True, runs_elsewhere=True),
    Command("assess", AssessConfig, ""),
    Command("probe", ProbeConfig, f"{_OPERATIONS}.probe:probe"),
    Command("neighbours", NeighboursConfig, f"{_OPERATIONS}.neighbours:neighbours"),
    Command("stats", StatsConfig, f"{_OPERATIONS}.stats:stats"),
    Command("diff", DiffConfig, f"{_OPERATIONS}.diff:diff"),
    Command("estimate", EstimateConfig, f"{_OPERATIONS}.estimate:estimate"),
    Command("clean", CleanConfig, f"{_OPERATIONS}.clean:clean"),
)

PROGRAMS = {"assess": "eval.assess"}
"""Subcommands that are programs of `eval`, for which this one is another name. `pipeline` imports nothing of `eval`: it
starts them as a shell would, with the arguments as they are."""

_BY_SETTINGS = {command.settings: command for command in COMMANDS}


def parse(arguments: Sequence[str]) -> Any:
    """Parse the settings of the subcommand that is named; help and mistakes end the process as tyro does."""
    subcommands: Any = Union[  # noqa: UP007 - made from the table
        tuple(Annotated[command.settings, tyro.conf.subcommand(command.name)] for command in COMMANDS)
    ]
    return tyro.cli(
        subcommands,
        prog="pipeline",
        description="Encode an image set once into a store of encoder tokens, and check, change and describe stores.",
        args=arguments,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    # Pillow warns of odd metadata in files it can read; what it cannot read is listed with its reason anyway.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    signal.signal(signal.SIGTERM, _interrupt)
    let_waiting_threads_sleep()
    arguments = sys.argv[1:] if arguments is None else arguments
    command: Command | None = None

    def work() -> int:
        nonlocal command
        if arguments and arguments[0] in PROGRAMS:
            return start_program(PROGRAMS[arguments[0]], arguments[1:])
        settings = parse(arguments)
        command = _BY_SETTINGS[type(settings)]
        return command.run(settings, arguments)

    def on_interrupt() -> str:
        continues = command is not None and command.continues
        return "stopped; run the same command again" + " to continue where it was" * continues

    return run_command(work, on_interrupt=on_interrupt)


def start_program(module: str, arguments: Sequence[str]) -> int:
    """Run a module as a program of its own, and show what it prints; returns its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def _interrupt(signum: int, frame: object) -> None:
    """End on SIGTERM as on Ctrl-C: leases are given back, half-written shards removed."""
    raise KeyboardInterrupt
