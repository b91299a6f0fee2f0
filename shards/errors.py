"""Errors a user can cause: one line each, saying the rule, the value and the remedy.

Commands print them as ``error: ...`` and leave with `UserError.exit_code`, without a traceback.
"""

import re

# Controls, what ends a line, what turns the direction of writing, and halves of characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable_text(text: str) -> str:
    r"""Return a text with escapes, such as `\n` and `\x1b`, for what a terminal would act on instead of showing it.

    Names come from stores, archives and folders of others.
    """
    return _UNSEEN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}")


class UserError(Exception):
    """Something outside the program is not as it must be; running on would be wrong.

    Its text is one line that can be shown anywhere, whatever the names in it.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable_text(super().__str__())


class UsageError(UserError):
    """What was asked for cannot be done; the command has to be given differently."""

    exit_code = 2


class SourceDamagedError(UsageError):
    """An archive of source images is not whole; it was named rightly, so the exit code is that of a failure."""

    exit_code = UserError.exit_code


class StoreError(UserError):
    """A store cannot be used."""


class StoreIncompleteError(StoreError):
    """A store has not been finished yet: shards or the manifest are still to come."""


class StoreDamagedError(StoreError):
    """Bytes of a store are not the ones its manifest and index promise."""


class IdentityMismatchError(StoreError):
    """Two things that must come from the same encoder or recipe do not."""


class UndecodableImageError(UserError):
    """A source image cannot be decoded; the message is the reason it is quarantined with."""
