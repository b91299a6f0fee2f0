"""The command line the trainers share: `[PRESET | config.json] [--setting value ...]`. Loads no torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from shards import UsageError, run_command
from train.settings.config import CompressorSettings, DecoderSettings, DiTSettings

_Settings = TypeVar("_Settings", DiTSettings, DecoderSettings, CompressorSettings)


def parse(
    arguments: Sequence[str],
    *,
    preset: Callable[[str], _Settings],
    default: str,
    script: str,
    presets: str,
) -> _Settings:
    """Parse settings from a command line.

    Args:
        arguments: what stands after the script's name; the first may be a preset or the config.json of a run.
        preset: settings of a preset by name.
        default: preset where none is named.
        script: the script, for the help text.
        presets: the list of presets, for the help text.

    Raises:
        UsageError: there is no such preset, or the file holds the other trainer's settings.
        UserError: the file is not valid.
    """
    import tyro

    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else (default, arguments)
    if name.endswith(".json"):
        from train.settings.saved_settings import load_settings

        loaded = load_settings(Path(name))
        if type(loaded) is not type(preset(default)):
            raise UsageError(f"{name} holds settings of another trainer than {script}")
        start: _Settings = dataclasses.replace(loaded, varies=name)
    else:
        start = preset(name)
        start = dataclasses.replace(start, out=Path("runs") / name)
    return tyro.cli(
        type(start),
        prog=f"{script} [PRESET | config.json]",
        description=f"{type(start).__doc__}\n\nPresets (default {default}):\n{presets}",
        default=start,
        args=list(rest),
        config=(tyro.conf.FlagConversionOff,),
    )


def run(
    main: Callable[[Sequence[str]], int],
    *,
    remedy: str = "run the same command again to continue from the last checkpoint",
) -> None:
    """Run a script's main function and end the process with its exit code.

    Args:
        main: From the arguments to the exit code.
        remedy: What Ctrl-C is answered with.
    """
    sys.exit(run_command(lambda: main(sys.argv[1:]), on_interrupt=lambda: f"interrupted; {remedy}"))
