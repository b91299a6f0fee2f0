"""Measure what another storage type would change in a finished store, before anything is converted.

python eval/assess.py STORE [--dtype int8] [--decoder SNAPSHOT]

`pipeline assess` starts this program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from eval.command import parse, run
from eval.settings import AssessSettings, require_decoder
from shards import printable_text


def main(arguments: Sequence[str]) -> int:
    """Print error by channel, bytes, and with a decoder what becomes of the images; returns the exit code."""
    settings = parse(arguments, AssessSettings, "pipeline assess", flags=True)
    if settings.decoder is not None:
        require_decoder(settings.decoder)
    from eval.reconstruct.assess import as_text, assessment

    facts = assessment(settings)
    text = json.dumps(facts, indent=1, ensure_ascii=False) if settings.json else as_text(facts)
    sys.stdout.write("".join(printable_text(line) + "\n" for line in text.split("\n")))
    return 0


if __name__ == "__main__":
    run(main)
