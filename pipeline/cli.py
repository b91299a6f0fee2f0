"""The `pipeline` command: one function a subcommand, heavy imports inside."""

import errno
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from pipeline.cores import let_waiting_threads_sleep
from pipeline.settings.additions import AddFieldConfig, AddViewConfig
from pipeline.settings.config import EncodeConfig
from pipeline.settings.operations import (
    AssessConfig,
    CleanConfig,
    ConvertConfig,
    DiffConfig,
    EstimateConfig,
    InspectConfig,
    MergeConfig,
    ReportConfig,
    ReshardConfig,
    StatsConfig,
    SubsetConfig,
    VerifyConfig,
)
from shards import UserError

INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE_PATH = frozenset(
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
)
"""What the system says of a path that the command line names, and no command can do anything about."""


def run_encode(config: EncodeConfig, arguments: Sequence[str]) -> None:
    """Runs `pipeline encode`."""
    from pipeline.operations.encode import encode

    encode(config, arguments)


def run_verify(config: VerifyConfig) -> None:
    """Runs `pipeline verify`."""
    from pipeline.operations.verify import verify

    verify(config)


def run_inspect(config: InspectConfig) -> None:
    """Runs `pipeline inspect`."""
    from pipeline.operations.facts import inspect

    inspect(config)


def run_convert(config: ConvertConfig) -> None:
    """Runs `pipeline convert`."""
    from pipeline.operations.convert import convert

    convert(config)


def run_reshard(config: ReshardConfig) -> None:
    """Runs `pipeline reshard`."""
    from pipeline.operations.reshard import reshard

    reshard(config)


def run_subset(config: SubsetConfig) -> None:
    """Runs `pipeline subset`."""
    from pipeline.operations.subset import subset

    subset(config)


def run_merge(config: MergeConfig) -> None:
    """Runs `pipeline merge`."""
    from pipeline.operations.merge import merge

    merge(config)


def run_add_view(config: AddViewConfig, arguments: Sequence[str]) -> None:
    """Runs `pipeline add-view`."""
    from pipeline.operations.add_view import add_view

    add_view(config, arguments)


def run_add_field(config: AddFieldConfig, arguments: Sequence[str]) -> None:
    """Runs `pipeline add-field`."""
    from pipeline.operations.add_field import add_field

    add_field(config, arguments)


def run_report(config: ReportConfig) -> None:
    """Runs `pipeline report`."""
    from pipeline.operations.report import report

    report(config)


def run_assess(config: AssessConfig) -> None:
    """Runs `pipeline assess`."""
    from pipeline.operations.assess import assess

    assess(config)


def run_stats(config: StatsConfig) -> None:
    """Runs `pipeline stats`."""
    from pipeline.operations.stats import stats

    stats(config)


def run_diff(config: DiffConfig) -> int:
    """Runs `pipeline diff`; its exit code."""
    from pipeline.operations.diff import diff

    return diff(config)


def run_estimate(config: EstimateConfig) -> None:
    """Runs `pipeline estimate`."""
    from pipeline.operations.estimate import estimate

    estimate(config)


def run_clean(config: CleanConfig) -> None:
    """Runs `pipeline clean`."""
    from pipeline.operations.clean import clean

    clean(config)


Command = (
    Annotated[EncodeConfig, tyro.conf.subcommand("encode")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[InspectConfig, tyro.conf.subcommand("inspect")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
    | Annotated[ReshardConfig, tyro.conf.subcommand("reshard")]
    | Annotated[SubsetConfig, tyro.conf.subcommand("subset")]
    | Annotated[MergeConfig, tyro.conf.subcommand("merge")]
    | Annotated[AddViewConfig, tyro.conf.subcommand("add-view")]
    | Annotated[AddFieldConfig, tyro.conf.subcommand("add-field")]
    | Annotated[AssessConfig, tyro.conf.subcommand("assess")]
    | Annotated[StatsConfig, tyro.conf.subcommand("stats")]
    | Annotated[DiffConfig, tyro.conf.subcommand("diff")]
    | Annotated[EstimateConfig, tyro.conf.subcommand("estimate")]
    | Annotated[CleanConfig, tyro.conf.subcommand("clean")]
)

COMMANDS: dict[type, Callable[[Any], int | None]] = {
    VerifyConfig: run_verify,
    InspectConfig: run_inspect,
    ReportConfig: run_report,
    ConvertConfig: run_convert,
    ReshardConfig: run_reshard,
    SubsetConfig: run_subset,
    MergeConfig: run_merge,
    AssessConfig: run_assess,
    StatsConfig: run_stats,
    DiffConfig: run_diff,
    EstimateConfig: run_estimate,
    CleanConfig: run_clean,
}

ENCODING: dict[type, Callable[[Any, Sequence[str]], None]] = {
    EncodeConfig: run_encode,
    AddViewConfig: run_add_view,
    AddFieldConfig: run_add_field,
}
"""Commands that engines may run elsewhere, with the same arguments."""
CONTINUING = (*ENCODING, ConvertConfig, ReshardConfig, SubsetConfig, MergeConfig)
"""Commands that, run again, do only what was not done before."""


def parse(arguments: Sequence[str]) -> Any:
    """The settings of the subcommand that a command line names; help and mistakes end the process as tyro does."""
    return tyro.cli(
        Command,
        prog="pipeline",
        description="Encode an image set once into a store of encoder tokens, and look after the store.",
        args=arguments,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    # Pillow warns of odd metadata in files it can read; what it cannot read is listed with its reason anyway.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    signal.signal(signal.SIGTERM, _interrupt)
    let_waiting_threads_sleep()
    arguments = sys.argv[1:] if arguments is None else arguments
    config: Any = None
    try:
        config = parse(arguments)
        if type(config) in ENCODING:
            ENCODING[type(config)](config, arguments)
            return 0
        return COMMANDS[type(config)](config) or 0
    except KeyboardInterrupt:
        continues = isinstance(config, CONTINUING)
        print(
            "stopped; run the same command again" + " to continue where it was" * continues, file=sys.stderr
        )
        return INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in _FULL:
            remedy = "free space and run the same command again"
            print(f"error: the disk is full ({error}); {remedy}", file=sys.stderr)
        elif error.errno in _UNUSABLE_PATH and error.filename is not None:
            remedy = "name another path, or see to what is there"
            print(f"error: {error.filename} cannot be used: {error.strerror}; {remedy}", file=sys.stderr)
        else:
            raise
        return UserError.exit_code


def _interrupt(signum: int, frame: object) -> None:
    """Ends on SIGTERM as on Ctrl-C: leases are given back, half-written shards removed."""
    raise KeyboardInterrupt
