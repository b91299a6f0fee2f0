"""How a command of any package ends: an exit code, and one line on stderr instead of a traceback.

Exit codes: 0, `UserError.exit_code` (1), `UsageError.exit_code` (2), 130 when it is interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from shards.errors import UsageError, UserError, printable_text

INTERRUPTED = 130
"""128 + SIGINT, as a shell reports it."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE_PATH = frozenset(
    (
        *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    )
)
"""What the system says of a path or a disk, and what no program can repair."""


def run_command(command: Callable[[], int | None], *, on_interrupt: Callable[[], str]) -> int:
    """Run a command; what a user can cause becomes one line on stderr.

    Args:
        command: does the work and returns the exit code, None for 0.
        on_interrupt: the line after Ctrl-C, asked for when it comes.

    Returns:
        The exit code. Errors that no user can cause are raised, with their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what its encoding does not
    try:
        return command() or 0
    except UserError as error:
        line, code = f"error: {error}", error.exit_code
    except KeyboardInterrupt:
        line, code = on_interrupt(), INTERRUPTED
    except OSError as error:
        described = _described(error)
        if described is None:
            raise
        line, code = f"error: {described}", UserError.exit_code
    sys.stderr.write(f"{printable_text(line)}\n")
    return code


def require_output_folder(folder: Path, option: str = "--out") -> None:
    """Check, before any work, that a folder can be written to or made.

    Args:
        folder: the folder, which need not be there yet.
        option: the option that names it, for the error.

    Raises:
        UsageError: something other than a folder is there or above it, or it may not be written to.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"{option} {folder} cannot be a folder, {nearest} is not one; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(
            f"{option} {folder} cannot be written, {nearest} does not permit it; name another folder"
        )


def _described(error: OSError) -> str | None:
    """Describe what the system refused in one line; None if the error is a mistake in the program."""
    if error.errno in _FULL:
        return f"the disk is full ({error}); free space and run the same command again"
    if error.errno in _UNUSABLE_PATH and error.filename is not None:
        return (
            f"{error.filename} cannot be used: {error.strerror}; name another path, or see to what is there"
        )
    return None
