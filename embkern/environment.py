"""What ``embkern env`` shows; it needs no transformers."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from ._version import __version__
from .ops.backends import BACKENDS, KERNELS, select, unavailable
from .ops.library import cpu_capability, load_native


def environment() -> dict[str, str]:
    """Return versions, devices, and the backend of every op with the reasons against the others, by name."""
    facts = {"embkern": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "transformers", "triton", "safetensors"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    if load_native() is None:
        facts["native CPU kernels"] = cpu_capability()
    facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for op in sorted({op for ops in KERNELS.values() for op in ops}):
            chosen = select(op, device, torch.float32)
            reasons = [
                f"{backend}: {reason}"
                for backend in BACKENDS
                if backend != chosen and (reason := unavailable(backend, op, device, torch.float32))
            ]
            facts[f"{op} on {device}"] = "; ".join([chosen, *reasons])
    return facts
