"""How long a training step waits for data, at rates of devices that are not here.

    python benchmarks/feed.py [--data DIR] [--rates 400,1500,5000] [--batch 64] [--seconds 5]

Reads rows [256, 768] float16 (393 kB) through `train.engine.feed.Feed`, as the trainers do, and stands in for the
device by sleeping until a step at the given rate would be over: a device computes without the processor. Prints the
share of time spent waiting and writes JSON. The goal is under 1 %; the highest rate at which it holds is searched for.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from measuring import make_store, make_tokens

from shards import Store
from train.distributed import Team
from train.engine.feed import Feed

GOAL = 0.01


def waiting_share(
    store: Store, team: Team, *, rate: float, batch: int, seconds: float, threads: int
) -> tuple[float, float]:
    """Share of time spent waiting for data, and images a second, of a consumer of `rate` images a second."""
    feed = Feed(
        store,
        team,
        fields=("tokens",),
        views=("center",),
        seed=0,
        global_batch_size=batch,
        micro_batch_size=None,
        start_sample=0,
        threads=threads,
    )
    batches = iter(feed)
    for _ in range(8):  # fill the ring, verify checksums, warm the page cache
        next(batches)
    waited, begun, steps = feed.data_wait, time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        next(batches)
        steps += 1
        time.sleep(batch / rate)
    elapsed = time.perf_counter() - begun
    share = (feed.data_wait - waited) / elapsed
    feed.close()
    return share, steps * batch / elapsed


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rates", default="400,1500,5000")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/feed.json"))
    arguments = parser.parse_args()

    tokens = make_tokens(arguments.data / f"tokens-{arguments.rows}.npy", arguments.rows)
    store = make_store(arguments.data / f"feed-{arguments.rows}", tokens, 8)
    team = Team()
    measured = []
    print("| images/s asked | images/s reached | waiting for data | under 1 % |\n|---|---|---|---|")
    for rate in [float(rate) for rate in arguments.rates.split(",")]:
        share, reached = waiting_share(
            store,
            team,
            rate=rate,
            batch=arguments.batch,
            seconds=arguments.seconds,
            threads=arguments.threads,
        )
        measured.append({"rate": rate, "reached": reached, "waiting": share})
        print(f"| {rate:.0f} | {reached:.0f} | {100 * share:.2f} % | {'yes' if share < GOAL else 'no'} |")
    share, reached = waiting_share(
        store,
        team,
        rate=float("inf"),
        batch=arguments.batch,
        seconds=arguments.seconds,
        threads=arguments.threads,
    )
    print(f"without any computation: {reached:.0f} images/s; load average {os.getloadavg()[0]:.1f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "fastest": reached, "batch": arguments.batch}
    arguments.out.write_text(json.dumps({"facts": facts, "rates": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
