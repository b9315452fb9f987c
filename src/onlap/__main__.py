"""``python3 -m onlap``: the command, also where nothing is installed."""

from __future__ import annotations

import sys

from onlap.cli import main

if __name__ == "__main__":
    sys.exit(main())
