"""`python -m kdhooks`, for torchrun -m."""

import sys

from kdhooks.cli import main

if __name__ == "__main__":
    sys.exit(main())
