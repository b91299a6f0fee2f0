"""Settings as JSON: saved with a run, read back strictly, and compared when the run is continued."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards import UsageError, UserError, read_document
from train.settings.config import CompressorSettings, DecoderSettings, DiTSettings, Settings

VERSION = 1
ORIGIN = frozenset({"out", "varies", "varies_in", "allow_change"})
"""Settings that say where a run is and how it came about, and are no difference between runs."""


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a config.json holds."""

    version: int
    trainer: str
    settings: dict[str, Any]


_TRAINERS: dict[str, type[Settings]] = {
    "dit": DiTSettings,
    "decoder": DecoderSettings,
    "compressor": CompressorSettings,
}


_RENAMED = {
    "adversary": {
        "learns_from_epoch": "discriminator_start_epoch",
        "plays_from_epoch": "adversarial_start_epoch",
    }
}
"""By group of settings, names of earlier versions and those of now."""


def trainer_of(settings: Settings) -> str:
    """Return the name of the script, without its ending, that settings are for."""
    return next(name for name, kind in _TRAINERS.items() if isinstance(settings, kind))


def to_json(settings: Settings) -> str:
    """Return the settings as JSON text, with the name of their trainer and the version of this form."""
    from pydantic import TypeAdapter

    trainer = trainer_of(settings)
    values = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return json.dumps({"version": VERSION, "trainer": trainer, "settings": values}, indent=2) + "\n"


def from_json(text: str | bytes, *, name: str) -> Settings:
    """Read what `to_json` wrote.

    Args:
        text: JSON text.
        name: what to call it in an error.

    Raises:
        UserError: it is not JSON, of another version, has an unknown key or a wrong type, or lacks a setting that has
            no default.
    """
    saved = read_document(text, _Saved, name=name)
    if saved.version != VERSION or saved.trainer not in _TRAINERS:
        raise UserError(
            f"{name} does not hold settings that this program reads: it says version {saved.version} of the trainer "
            f"{saved.trainer!r}; there is version {VERSION} of {' and '.join(_TRAINERS)}"
        )
    _rename(saved.settings)
    settings: Settings = read_document(json.dumps(saved.settings), _TRAINERS[saved.trainer], name=name)
    # Unknown keys are passed over; what was made of the text does not hold them.
    unknown = sorted(set(_flat(saved.settings)) - set(_flat(json.loads(to_json(settings))["settings"])))
    if unknown:
        raise UserError(f"{name} has unknown settings: {', '.join(unknown)}")
    return settings


def _rename(settings: dict[str, Any]) -> None:
    """Give settings of earlier versions the names they have now."""
    for group, names in _RENAMED.items():
        values = settings.get(group)
        for before, now in names.items():
            if isinstance(values, dict) and before in values:
                values[now] = values.pop(before)


def load_settings(path: Path) -> Settings:
    """Read RUN/config.json.

    Raises:
        UserError: it is not there or not valid.
    """
    if not path.is_file():
        raise UserError(f"there is no settings file {path}")
    return from_json(path.read_bytes(), name=str(path))


def changed_settings(before: Settings, now: Settings) -> dict[str, str]:
    """List the fixed settings that differ, by name: "before → now"."""
    if type(before) is not type(now):
        return {"trainer": f"{type(before).__name__} → {type(now).__name__}"}
    return _changes(before, now, [f.name for f in dataclasses.fields(now) if not f.metadata.get("free")])


def differing_settings(before: Settings, now: Settings) -> tuple[str, ...]:
    """List all settings that differ, but for where a run is and how it came about, each as "NAME: BEFORE → NOW"."""
    names = [f.name for f in dataclasses.fields(now) if f.name not in ORIGIN]
    return tuple(f"{name}: {change}" for name, change in _changes(before, now, names).items())


def _changes(before: Settings, now: Settings, names: Sequence[str]) -> dict[str, str]:
    old = _flat({name: getattr(before, name) for name in names})
    new = _flat({name: getattr(now, name) for name in names})
    return {
        name: f"{old.get(name)} → {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def require_same_run(before: Settings, now: Settings) -> None:
    """Refuse to continue a run with other fixed settings than it began with, unless they are allowed by name.

    Raises:
        UsageError: naming each difference, and how to insist.
    """
    allowed = {name.lstrip("-").replace("-", "_") for name in now.allow_change}
    changes = changed_settings(before, now)
    refused = {
        name: change
        for name, change in changes.items()
        if name not in allowed and name.split(".")[0] not in allowed
    }
    if refused:
        listed = "; ".join(f"{name}: {change}" for name, change in refused.items())
        raise UsageError(
            f"this run was begun with other settings ({listed}); continue it with its own, "
            f"choose another --out, or insist with --allow-change {' '.join(refused)}"
        )


def flat_values(settings: Settings) -> dict[str, bool | int | float | str]:
    """Return the settings with dotted names and values that any tracker takes: what is no number is written as text."""
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in _flat(settings).items()
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dataclasses and dictionaries as one dictionary with dotted names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat.update(_flat(item, f"{prefix}{name}."))
    return flat
