"""The engines that take training steps, and which one serves a run."""

from __future__ import annotations

from ...ops.backends import select
from .graph import GraphSteps
from .steps import NativeSteps, TorchSteps, Weights

# By name, best first.
ENGINES: dict[str, type[NativeSteps] | type[GraphSteps] | type[TorchSteps]] = {
    "native": NativeSteps,
    "graph": GraphSteps,
    "torch": TorchSteps,
}


def select_engine(engine: str | None, weights: Weights) -> str:
    """Return the engine asked for, or the first that can serve; ``EMBKERN_BACKEND`` counts.

    Raises:
        ValueError: there is no such engine.
        RuntimeError: the engine asked for cannot serve, and why.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    backend = select("autoencoder", weights.parameters.device.type, weights.parameters.dtype)
    for name, kind in ENGINES.items():
        reason = kind.unavailable(weights)
        if engine == name and reason:
            raise RuntimeError(f"engine: {name!r} cannot serve this run: {reason}")
        if engine == name or (engine is None and not reason and (name != "native" or backend == "native")):
            return name
    raise AssertionError("the torch engine serves every run")
