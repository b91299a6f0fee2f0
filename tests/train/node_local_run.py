"""train/dit.py where every process sees another disk: its number is added to --out.

The processes of one machine then look at a run as those of several machines do whose --out is not shared.
"""

from __future__ import annotations

import os
import sys

from train.dit import main
from train.settings.commandline import run

if __name__ == "__main__":
    place = sys.argv.index("--out") + 1
    sys.argv[place] += f"-{os.environ['RANK']}"
    run(main)
