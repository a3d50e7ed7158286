"""What holds of every launch that is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from embkern.triton.launch import Launch


def assert_specialised_as_at_run_time(launches: Iterable[Launch]) -> None:
    """Types, constants and alignment are those that the launcher of Triton derives from the arguments."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for launch in launches:
        binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        bound, specialization, _ = binder(**launch.arguments, **launch.options)
        signature, constants, attributes = launch.specialization()
        assert signature == dict(zip(bound, (kind for kind, _ in specialization), strict=True))
        for position, (kind, detail) in enumerate(specialization):
            assert ((position,) in constants) == (kind == "constexpr")
            if kind != "constexpr":
                assert backend.parse_attr(detail or "") == attributes.get((position,), [])
