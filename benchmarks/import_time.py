"""What `import embkern` costs beyond torch: fresh interpreters, interleaved."""

from __future__ import annotations

import argparse
import subprocess
import sys

from embkern.experiments.timing import interleaved

from .results_file import command_line, write_results

STATEMENTS = [
    "pass",
    "import embkern",
    "import torch",
    "import torch, embkern",
    "import torch, embkern.ops",
    "import torch, embkern; embkern.FactorizedEmbedding",
    "import torch, transformers.modeling_utils",
    "import torch, transformers.modeling_utils, embkern",
]


def main(arguments: list[str]) -> None:
    """Time each statement in a new process and print medians in milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks import_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    times = interleaved(
        {
            code: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)  # type: ignore[misc]
            for code in STATEMENTS
        },
        repeats=options.repeats,
        warmup=1,
    )
    rows = [{"statement": name, "us": each} for name, each in times.items()]
    for name, each in times.items():
        print(f"{name:54}{each['median'] / 1e3:9.1f} ms")
    print("->", write_results("import_time", command_line("import_time", arguments), rows))
