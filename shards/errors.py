"""Errors a user can cause: one line each, saying the rule, the value and the remedy.

Commands print them as ``error: ...`` and leave with `UserError.exit_code`, without a traceback.
"""


class UserError(Exception):
    """Something outside the program is not as it must be; running on would be wrong."""

    exit_code = 1


class UsageError(UserError):
    """What was asked for cannot be done; the command has to be given differently."""

    exit_code = 2


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
