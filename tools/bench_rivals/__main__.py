"""Entry: `python tools/bench_rivals`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # so that this folder is a package, beside bench.py

if __name__ == "__main__":
    from bench_rivals.command import main

    main()
