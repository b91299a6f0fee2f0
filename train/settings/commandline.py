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


def parse_runs(
    arguments: Sequence[str],
    *,
    preset: Callable[[str], _Settings],
    default: str,
    script: str,
    presets: str,
) -> tuple[_Settings, ...]:
    """Parse the settings of the runs that a command line asks for: one, or one a seed where --seed has several.

    Each seed's run has the folder OUT/seed-SEED and is a run like any other. It varies the run whose config.json is
    given; without one, the run of the first seed.

    Args:
        arguments: as `parse` takes them.
        preset: likewise.
        default: likewise.
        script: likewise.
        presets: likewise.

    Raises:
        UsageError: a seed is named twice, or as `parse` does.
        UserError: as `parse` does.
    """
    seeds, commands = _one_a_seed(arguments)
    found = [
        parse(command, preset=preset, default=default, script=script, presets=presets) for command in commands
    ]
    if len(found) == 1:
        return (found[0],)
    if len({settings.seed for settings in found}) < len(found):
        raise UsageError(f"--seed names a seed twice: {' '.join(seeds)}; a run each needs seeds that differ")
    if arguments[0].endswith(".json") and not any(word.partition("=")[0] == "--out" for word in arguments):
        raise UsageError(
            f"the runs of several seeds need a folder of their own beside the run of {arguments[0]}; give --out"
        )
    runs: list[_Settings] = []
    for settings in found:
        assert settings.out is not None
        apart = dataclasses.replace(settings, out=settings.out / f"seed-{settings.seed}")
        runs.append(_varying(apart, runs[0]) if runs and apart.varies is None else apart)
    return tuple(runs)


def _one_a_seed(arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the words that follow --seed, and the command with each alone, or as it is if they are not several."""
    words = list(arguments)
    start = len(words) - words[::-1].index("--seed") if "--seed" in words else len(words)
    end = next((i for i, word in enumerate(words[start:], start) if word.startswith("--")), len(words))
    seeds = words[start:end]
    if len(seeds) < 2:
        return seeds, [words]
    return seeds, [[*words[:start], seed, *words[end:]] for seed in seeds]


def _varying(settings: _Settings, base: _Settings) -> _Settings:
    """Return the settings with a note of the run they vary and in what."""
    from train.settings.saved_settings import differing_settings

    assert base.out is not None
    changes = differing_settings(base, settings)
    return dataclasses.replace(settings, varies=str(base.out / "config.json"), varies_in=changes)


def parse(
    arguments: Sequence[str],
    *,
    preset: Callable[[str], _Settings],
    default: str,
    script: str,
    presets: str,
) -> _Settings:
    """Parse the settings of one run from a command line.

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
        # What was insisted on once holds for the command that did.
        start: _Settings = dataclasses.replace(loaded, allow_change=())
    else:
        start = preset(name)
        start = dataclasses.replace(start, out=Path("runs") / name)
    settings = tyro.cli(
        type(start),
        prog=f"{script} [PRESET | config.json]",
        description=f"{type(start).__doc__}\n\nPresets (default {default}):\n{presets}",
        default=start,
        args=list(rest),
        config=(tyro.conf.FlagConversionOff,),
    )
    if not name.endswith(".json"):
        return dataclasses.replace(settings, varies=None, varies_in=())
    return _varying(settings, dataclasses.replace(start, out=Path(name).parent))


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
