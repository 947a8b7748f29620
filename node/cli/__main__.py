"""Runs `dsd` as `python -m node.cli`."""

import sys

from node.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
