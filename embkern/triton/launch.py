"""A kernel launch as a value: the launchers run it on a device, `aot.py` compiles it without one.

A kernel is compiled for what it is specialised on: constants, types, and which pointers are multiples of 16
bytes. Triton's launcher derives that from all arguments at every call and makes a text of it and of the
compiler's options. Here a tuple is the key, and the compiled kernel is launched with positional arguments, in
half of the time. Triton's launcher runs at the first call for a key, and always in the interpreter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import itemgetter
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


# What Triton's launcher compiled, by key.
_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


@functools.cache
def _parameters(kernel: Any) -> tuple[Any, Any, Any]:
    """Return what takes from a dict all arguments of a kernel, its constants, and the others, as tuples."""
    constants = [each.name for each in kernel.params if each.is_constexpr]
    others = [each.name for each in kernel.params if not each.is_constexpr]
    # Of a single name itemgetter returns no tuple: the first one is taken twice.
    return itemgetter(*kernel.arg_names), itemgetter(*constants, constants[0]), itemgetter(*others, others[0])


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

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        options = {**_OPTIONS, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if _BOUND_REGISTERS:
            options["maxnreg"] = min(255, 65536 // (32 * self.num_warps))
        return options

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        if not isinstance(self.kernel, triton.JITFunction):  # the interpreter's
            self.kernel[self.grid](**self.arguments, **self.options)
            return
        key, values = self._key()
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self.kernel[self.grid](**self.arguments, **self.options)
        else:
            compiled[self.grid + (1,) * (3 - len(self.grid))](*values)

    def _key(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return what determines the compiled kernel on this device, and the arguments in order."""
        all_of, constants_of, others_of = _parameters(self.kernel)
        key: list[Any] = [self.kernel, self.num_warps, self.num_stages, constants_of(self.arguments)]
        for value in others_of(self.arguments):
            if value is None:
                key.append(None)
            elif type(value) is int:
                key.append(-(2**31) <= value < 2**31)
            elif type(value) is not float:  # a tensor
                key += (value.dtype, value.data_ptr() % 16 == 0, value.get_device())
        return tuple(key), all_of(self.arguments)

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
