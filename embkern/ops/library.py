"""The op namespace: schemas, fakes, what the ops share, and the native extension that implements them.

Schemas are defined in Python and not in C++, so that the ops exist, can be traced and can say what is
missing where the extension is not built. There is one overload per backend, such as
``embkern::gather_project_forward.native``.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import Function, forward_ad

NAMESPACE = "embkern"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define("cpu_capability(int level) -> int")
LIBRARY.define("exp_and_tanh(Tensor values) -> (Tensor, Tensor)")  # For tests.
LIBRARY.define("poison_memory(bool on) -> ()")  # For tests: NaN in new memory of the kernels.

# The ops of inference in terms of aten, for torch.export.ExportedProgram.run_decompositions. The result runs
# where embkern is not installed, over the same tensors: a table stays packed. They are not registered with
# torch: the compiler refuses ops that it finds there where the environment variable CI is set.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    *,
    backends: tuple[str, ...],
    fake: Callable[..., Any],
    python: dict[str, Callable[..., Any]] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> None:
    """Define one overload of ``name`` per backend, with ``fake`` as its shape function.

    The extension binds the native implementations. The Triton one is the function ``name`` in the module of
    ``embkern.triton`` that has the name of the module of ``fake``; it is imported at the first call.

    ``python`` has the implementations of other backends, which consist of other ops. They are loops over the
    table, which a compiler would unroll: as an op they are one node of a graph, whatever the table's size.

    ``decomposition`` is the op in terms of aten, as an entry of ``DECOMPOSITIONS``.
    """
    python = python or {}
    for backend in (*backends, *python):
        overload = f"{name}.{backend}"
        LIBRARY.define(overload + schema)
        LIBRARY.impl(overload, fake, "Meta")
        if backend in python:
            LIBRARY.impl(overload, _without_grad(python[backend]), "CompositeExplicitAutograd")
        elif backend == "triton":
            launcher = _lazy(f"embkern.triton.{fake.__module__.rpartition('.')[2]}", name)
            LIBRARY.impl(overload, launcher, "CUDA")
            LIBRARY.impl(overload, launcher, "CPU")  # Triton's interpreter
        if decomposition is not None:
            op = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
            DECOMPOSITIONS[op] = decomposition


def _without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.no_grad():  # A call from an exported program may be in grad mode.
            return function(*args)

    return call


def _lazy(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


def overload(name: str, backend: str) -> Any:
    """Return the raw op of one backend."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)


def check_ids(ids: torch.Tensor, count: int) -> None:
    """Raise IndexError with the first id that is out of range, if there is one.

    It reads all ids and therefore runs only after a backend failed. Ids on CUDA have the kernels' assertions.
    """
    if not ids.is_cpu or torch.compiler.is_compiling():
        return
    wrong = ((ids < 0) | (ids >= count)).reshape(-1).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise IndexError(
            f"ids: expected 0 <= id < {count}, got {int(ids.reshape(-1)[place])} at flat position {place}"
        )


def is_exporting() -> bool:
    """Return whether torch.export is tracing.

    The function of this name in torch.compiler is True under torch.compile, too, in some releases of torch.
    """
    return torch.compiler._is_exporting_flag


def is_exporting_to_onnx() -> bool:
    """Return whether torch.onnx.export is tracing, which has no operators for the ops of embkern."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def needs_autograd(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call must go through its autograd.Function, which is slower than the raw op.

    Forward-mode AD goes there, too: the Function refuses it, where the raw op would drop the tangent.
    Programs of torch.export and torch.jit.trace are for inference and have the raw op: they hold no Function.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:  # A generator would slow down the lookup of a single token.
            if tensor is not None and tensor.requires_grad:
                tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
                return not (tracing or is_exporting())
    return forward_ad._current_level >= 0


# What Function.apply does with its arguments unless a functorch transform is active.
try:
    from torch._functorch.utils import unwrap_dead_wrappers as _unwrap_dead_wrappers

    _functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
except (ImportError, AttributeError):  # These names of torch are private.
    _functorch_active = lambda: True  # noqa: E731


def apply(function: type[Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, for calls that pass every argument of the forward.

    ``Function.apply`` first binds them to the forward's signature, which takes longer than a small kernel.
    """
    if torch.compiler.is_compiling() or _functorch_active():
        return function.apply(*args)
    return super(Function, function).apply(*_unwrap_dead_wrappers(args))  # type: ignore[misc]


def raise_refusal(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check in the handler of a failed call; its error has one traceback, not a chain of two."""
    try:
        check(*arguments)
    except (IndexError, TypeError, ValueError) as error:
        raise error from None


# How the errors of the native ops begin (csrc/checks.h), such as "directory: expected".
_REFUSED_ARGUMENT = re.compile(r"\w+: expected ")


def reraise_native(error: Exception) -> None:
    """Raise the ValueError that a native op threw, if ``error`` stands for one.

    Up to 2.14 torch surfaces std::invalid_argument as ValueError itself, 2.15 as RuntimeError.
    """
    if type(error) is RuntimeError and _REFUSED_ARGUMENT.match(str(error)):
        raise ValueError(str(error)) from None


def second_derivative_refused() -> RuntimeError:
    """Return the error that refuses to differentiate a gradient."""
    return RuntimeError(
        "embkern's ops are differentiable once, and this needs a second derivative (create_graph, or "
        "nested torch.func.grad); use the plain torch formula of the op's docstring for that"
    )


class _OnceDifferentiable(Function):
    """The identity on a gradient; its own backward is refused.

    ``torch.autograd.function.once_differentiable`` refuses only second derivatives that pass through the
    incoming gradient. It would silently drop a penalty on the gradient of a sum.
    """

    @staticmethod
    def forward(grad: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return grad.clone() if grad.is_sparse else grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        raise second_derivative_refused()


def differentiable_once(grad: torch.Tensor, *sources: torch.Tensor | None) -> torch.Tensor:
    """Return a computed gradient that refuses to be differentiated with respect to ``sources``."""
    if not torch.is_grad_enabled():
        return grad
    once: torch.Tensor = apply(_OnceDifferentiable, grad, *(each for each in sources if each is not None))
    return once


@functools.cache
def load_native() -> str | None:
    """Load the native extension; return None on success and the reason it cannot be used otherwise."""
    candidates = sorted(Path(__file__).parent.parent.glob("_C*.so")) + sorted(
        Path(__file__).parent.parent.glob("_C*.pyd")
    )
    if not candidates:
        return "the native extension is not built (no compiler at install time, or EMBKERN_NATIVE=0)"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return (
            f"the native extension does not load with torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None


CPU_CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16")


def cpu_capability(level: str | None = None) -> str:
    """Return the instruction set that the native CPU kernels use, after setting it to ``level`` if given.

    The default is the best that this processor has; ``EMBKERN_CPU_CAPABILITY`` sets a lower one.

    Raises:
        ValueError: the level is unknown, or the processor or the build lacks it.
        RuntimeError: the native extension cannot be used; the message says why.
    """
    if reason := load_native():
        raise RuntimeError(reason)
    if level is not None and level not in CPU_CAPABILITIES:
        raise ValueError(f"level: expected one of {', '.join(CPU_CAPABILITIES)}, got {level!r}")
    index = -1 if level is None else CPU_CAPABILITIES.index(level)
    return CPU_CAPABILITIES[torch.ops.embkern.cpu_capability(index)]
