"""fsspec's file systems: one a scheme and process, with time limits; `shards.storage.remote_calls` retries."""

from __future__ import annotations

from functools import cache
from typing import Any

from shards.errors import UsageError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
WRITABLE = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
WEB = frozenset({"http", "https"})
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0


@cache
def file_system(scheme: str, process: int) -> Any:
    """Fsspec's file system of this process; connections do not survive a fork."""
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UsageError(
            f"{scheme}:// is not a scheme that fsspec knows; use s3://, gs://, https:// or a folder"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'rae-latents[{extra}]'" if extra else f"install the library it names ({error})"
        raise UsageError(f"{scheme}:// needs a library that is not installed; {remedy}") from error
    # Attempts are counted in `retried`; the libraries' own would multiply them.
    settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in WEB:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        settings["client_kwargs"] = {"timeout": timeout}
    if scheme in ("s3", "s3a"):
        settings["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 128,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
        }
    system = kind(**settings)
    if scheme in ("s3", "s3a"):
        system.retries = 1
    return system


def forget_connections() -> None:
    """Connect again, with the endpoint and credentials that are in the environment then."""
    file_system.cache_clear()
