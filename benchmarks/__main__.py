"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME [OPTIONS]` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "methods": "SVD, PCA and the paper's autoencoder on a real table: quality and seconds",
    "backends": "every backend of every op, interleaved: what ops/backends.py prefers, and why",
    "import_time": "what `import embkern` costs beyond torch",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        for name, what in BENCHMARKS.items():
            print(f"python -m benchmarks {name:12} {what}")
        sys.exit(len(sys.argv) > 1)
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
