"""python -m engine.kernels.compile: the name by which users know `engine.compile`."""

from __future__ import annotations

import sys

from engine.compile import main

if __name__ == "__main__":
    sys.exit(main())
