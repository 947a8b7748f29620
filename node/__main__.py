"""`python -m node` is `dsd`."""

import sys

from node.cli import main

sys.exit(main())
