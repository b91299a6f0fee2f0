"""A command ends with an exit code and one line; paths are refused before any work."""

from __future__ import annotations

import errno
import os

import pytest

from shards import UsageError, UserError, require_output_folder, run_command


def ending(error):
    def command():
        raise error

    return run_command(command, on_interrupt=lambda: "stopped; run it again")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("this is damaged"), 1, "error: this is damaged"),
        (UsageError("this cannot be"), 2, "error: this cannot be"),
        (KeyboardInterrupt(), 130, "stopped; run it again"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            1,
            "error: a/b cannot be used: Permission",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[31m\nb"),
            1,
            "error: a\\x1b[31m\\nb cannot be used: No such",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_user_can_cause_becomes_one_line(error, code, line, capsys):
    assert ending(error) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "Bad file descriptor")])
def test_what_only_the_program_can_cause_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        ending(error)


def test_a_command_that_returns_nothing_has_succeeded():
    assert run_command(lambda: None, on_interrupt=str) == 0
    assert run_command(lambda: 3, on_interrupt=str) == 3


def test_an_output_folder_may_be_there_or_be_made_but_not_lie_in_a_file(tmp_path):
    (tmp_path / "file").touch()
    for good in (tmp_path, tmp_path / "new/folder"):
        require_output_folder(good)
    for bad in (tmp_path / "file", tmp_path / "file/under"):
        with pytest.raises(UsageError, match=r"--out .*file is not one"):
            require_output_folder(bad)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="does not permit"):
        require_output_folder(tmp_path / "new")
    tmp_path.chmod(0o700)
