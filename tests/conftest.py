"""What the tests share: backends, a poisoned allocator, the numerical contract, graph counting."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, read before CUDA starts
# Tests load what is on the disk. The hub's client would try for a minute to fetch a model that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores, and so do theirs
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from embkern.ops.backends import BACKENDS, KERNELS, unavailable
from embkern.ops.library import load_native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords have the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# What the tests draw. They have to pass whatever the seed: EMBKERN_TEST_SEED=7 runs them on other numbers.
SEED = int(os.environ.get("EMBKERN_TEST_SEED", "0"))


def seed_of(own: int) -> int:
    """Return the seed of a test that has a generator of its own: ``own``, moved by EMBKERN_TEST_SEED."""
    return own + 1_000_003 * SEED


_lost: list[str] = []  # why this process can run nothing on its device any more


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """After an error that CUDA keeps, say so: every later test of this process would fail for it."""
    report = yield
    if report.failed and torch.cuda.is_initialized() and not _lost:
        from benchmarks.machine import lost_context

        if reason := lost_context():
            _lost.append(reason)
            report.sections.append(("the CUDA context of this process is lost", reason))
            if "PYTEST_XDIST_WORKER" not in os.environ:
                item.session.shouldstop = f"the CUDA context is lost: {reason}"
    return report


def pytest_runtest_logfinish() -> None:
    """End a worker whose context is lost: xdist starts another one for the tests that are left."""
    if _lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(seed_of(0))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN, native code's too, so that an unwritten output shows."""
    native_memory = torch.ops.embkern.poison_memory if load_native() is None else lambda on: None
    native_memory(True)
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
    native_memory(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``backend`` and ``device`` with every pair that has a kernel of its OP."""
    if "backend" not in metafunc.fixturenames:
        return
    pairs = []
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for backend in BACKENDS:
            if backend == "torch" or metafunc.module.OP in KERNELS.get((backend, device), ()):
                reason = unavailable(backend, metafunc.module.OP, device, torch.float32)
                skip = [pytest.mark.skip(reason=reason)] if reason else []
                pairs.append(pytest.param(backend, device, marks=marks + skip, id=f"{backend}-{device}"))
    metafunc.parametrize(("backend", "device"), pairs)


@pytest.fixture
def native() -> str:
    """The native backend, for tests of what only it promises."""
    if reason := load_native():
        pytest.skip(reason)
    return "native"


def compile_counting(function: Callable) -> tuple[Callable, list]:
    """Compile to one graph with dynamic shapes; the list grows with every graph, forward and backward."""
    graphs: list = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend), graphs


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert torch.isfinite(got).all(), "unwritten or overflown values"
    got, exact = got.detach(), exact.detach()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_no_worse_than(got, native, exact, tiny: float = 1e-7) -> None:
    """The numerical contract: at most twice the error that plain torch makes in the same dtype.

    Or what one rounding of the exact result may cost, half an eps: of few values plain torch may have less by
    luck.
    """
    ours, theirs = relative_error(got, exact), relative_error(native, exact)
    rounding = torch.finfo(got.dtype).eps / 2
    assert ours <= max(2 * theirs, rounding) + tiny, f"error {ours:.2e}, plain torch makes {theirs:.2e}"


# Values that carry an error, at least: (sum e^2)^2 / sum e^4, a third of their number for normal ones and few
# where a few have most of it. The ratio of two root mean squares then has a standard deviation of 1/8.
COMPARED_VALUES = 32
MOST_DRAWS = 64


def is_enough(got: torch.Tensor, native: torch.Tensor, exact: torch.Tensor) -> bool:
    for values in (got, native):
        squares = (values.double() - exact) ** 2
        if not squares.any():
            squares = exact != 0
        squares = squares / squares.max().clamp_min(1e-300)
        if squares.sum() ** 2 < COMPARED_VALUES * (squares**2).sum():
            return False
    return True


def assert_no_worse_over_draws(
    draw: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]], tiny: float = 1e-7
) -> None:
    """``assert_no_worse_than`` for each result of ``draw``, over as many draws as the errors need.

    ``draw`` returns the results, those of plain torch, and those of float64, of new numbers at every call.
    """

    def flat() -> list[list[torch.Tensor]]:
        return [[each.detach().flatten() for each in kind] for kind in zip(*draw(), strict=True)]

    compared = flat()
    for _ in range(1, MOST_DRAWS):
        if all(is_enough(*kind) for kind in compared):
            break
        compared = [
            [torch.cat(pair) for pair in zip(before, drawn, strict=True)]
            for before, drawn in zip(compared, flat(), strict=True)
        ]
    for kind in compared:
        assert_no_worse_than(*kind, tiny)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the directory of a saved dense model with its tokenizer."""
    from tests.example_models import build, word_tokenizer

    build("bert").save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of text that the tokenizer of ``source`` knows."""
    path = tmp_path / "text.txt"
    path.write_text("red green\nblue\nred\ngreen green blue\n")
    return path
