"""Stage 6: the tests marked gpu in several processes, with a line per test as it ends.

With xdist, each process takes files in a row, so that it compiles a kernel once, and one that is done takes
tests from the others: the largest file is ten times the smallest. A process whose CUDA context is lost ends
(tests/conftest.py), and a new one takes its tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from .lines import TEST, append, plan

# Folders of tests marked gpu that need only what the kernels need, and those that need more.
TESTS = ("tests/cuda", "tests/ops", "tests/triton")
TESTS_OF_METHODS = ("tests/methods/autoencoder/test_graph.py",)
PROCESSES = 14
REHEARSED = ("tests/ops/test_backends.py", "tests/ops/test_arguments.py")


class Recorder:
    """A plugin that appends what is planned, and a line per test; in the process that starts the others."""

    def __init__(self, results: Path) -> None:
        self.results, self.planned = results, False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without xdist the tests are collected here."""
        self._plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """With it, every process collects the same ones."""
        self._plan(ids)

    def _plan(self, names: list[str]) -> None:
        if names and not self.planned:
            self.planned = True
            plan(self.results, TEST, names)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the call, or what prevented it or failed after it."""
        if report.when == "call" or report.outcome != "passed":
            line = {TEST: report.nodeid, "status": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                line["why"] = str(crash.message if crash else report.longrepr).strip().partition("\n")[0]
            append(self.results, line)


def main(arguments: list[str]) -> int:
    """Run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu_check.suite", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="file of lines, which are appended")
    parser.add_argument("--rehearse", action="store_true", help="two files that need no device")
    parser.add_argument("--tests", nargs="+", help="files or folders in place of the default")
    options = parser.parse_args(arguments)
    given = ["--tb=short", "--durations=5", "-p", "no:cacheprovider", *workers()]
    if options.rehearse:
        given += options.tests or REHEARSED
    else:
        methods = TESTS_OF_METHODS if importlib.util.find_spec("pydantic") else ()
        given += ["-m", "gpu", *(options.tests or (*TESTS, *methods))]
    return int(pytest.main(given, plugins=[Recorder(options.results)]))


def workers() -> list[str]:
    """Return pytest's options for several processes, each with its own CUDA context."""
    if not importlib.util.find_spec("xdist"):
        return []
    count = max(2, min(PROCESSES, (os.cpu_count() or 1) - 2))
    return ["-n", str(count), "--dist", "worksteal", "--max-worker-restart", "40"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
