"""`python -m pipeline`, also as `accelerate launch -m pipeline`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
