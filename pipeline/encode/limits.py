"""Which stage of an encode is the limit, and how fast each one could be."""

from dataclasses import dataclass

STAGES = ("decode", "read", "device", "writer", "disk")
"""Of images, reading is a part of `decode`; stored tokens are only `read`. The writer's time includes the disk's: its
digests and sums run beside the writing."""


@dataclass(frozen=True)
class Limits:
    """Images a second that each stage could reach by itself, all workers and views together.

    Attributes:
        rates: By stage; a stage of which nothing was measured is not there.
    """

    rates: dict[str, float]

    @classmethod
    def of_busy(cls, images: int, busy: dict[str, float]) -> "Limits":
        """Return the rates of stages that were busy for some seconds.

        Args:
            images: Images that went through.
            busy: Seconds by stage that each of its threads or devices was busy, on average.
        """
        return cls({stage: images / busy[stage] for stage in STAGES if busy.get(stage, 0.0) > 0 and images})

    @property
    def limit(self) -> str | None:
        """The slowest stage; the disk where it takes most of the writer's time. None if nothing was measured."""
        stages = [stage for stage in self.rates if stage != "disk"]
        if not stages:
            return None
        slowest = min(stages, key=self.rates.__getitem__)
        if slowest == "writer" and self.rates.get("disk", float("inf")) < 2 * self.rates["writer"]:
            return "disk"
        return slowest

    @property
    def named(self) -> str:
        """The limit and what each stage could reach, in words."""
        each = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in self.rates.items())
        return f"{self.limit} (images/s each could reach: {each})"

    def __str__(self) -> str:
        return "limit not known yet" if self.limit is None else f"limit: {self.named}"
