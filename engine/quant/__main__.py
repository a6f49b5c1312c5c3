"""python -m engine.quant: the name by which users know `engine.compression`."""

from __future__ import annotations

import sys

from engine.compression.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
