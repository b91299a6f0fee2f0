"""What `verify_store` reports."""

from __future__ import annotations

from dataclasses import dataclass

from shards.storage.remote_calls import RemoteError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store.

    Attributes:
        path: The object, by its name inside the store.
        message: What is wrong with it.
        view: View, where the object holds a shard.
        shard: Number of the shard, where the object holds one.
        row: Row, where the wrong bytes belong to one.
    """

    path: str
    message: str
    view: str | None = None
    shard: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        """One line for a terminal."""
        numbers = {"shard": self.shard, "row": self.row}
        places = ", ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)
        return f"{self.path} ({places}): {self.message}" if places else f"{self.path}: {self.message}"


def require_reachable(error: Exception) -> None:
    """Raise an error again that tells of a server that does not answer, and nothing of the store's bytes."""
    if isinstance(error, RemoteError):
        raise error
