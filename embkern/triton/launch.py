"""A kernel launch as a value: the launchers run it on a device, `aot.py` compiles it without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
# `debug` compiles the assertions on ids. Without sanitize_overflow=False it would check every integer sum.
_OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}
# The ptxas of Triton 3.6 to 3.8 spills some registers where that makes room for one more block on a
# multiprocessor. Given a bound on the registers, here the hardware's own, it does not.
_BOUND_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel``: the grid, every argument by name, and the compiler's options.

    The kernels declare every integer argument ``do_not_specialize``, so that another number of ids does not
    compile again; sizes of the model (r, H) are constexpr.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Complete the options."""
        options = {**_OPTIONS, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if _BOUND_REGISTERS:
            options["maxnreg"] = min(255, 65536 // (32 * self.num_warps))
        object.__setattr__(self, "options", options)

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)

    def specialization(self) -> tuple[dict, dict, dict]:
        """Return signature, constants and attributes as Triton's launcher derives them from the arguments."""
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(position,)] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = parameter.annotation_type or "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        return signature, constants, attributes

    def compile(self, capability: int) -> CompiledKernel:
        """Compile for a compute capability such as 90, with no device, exactly as ``run`` would there."""
        source = ASTSource(self.kernel, *self.specialization())
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
