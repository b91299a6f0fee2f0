"""Lines for people, on standard error, above a progress line if one is shown."""

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Prints one line."""
    tqdm.write(line, file=sys.stderr)
