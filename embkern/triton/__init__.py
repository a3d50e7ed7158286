"""Triton kernels: one module per op (`_x_kernel` jit, `x_forward` launcher); none is written yet.

A kernel enters service in three lines: its overload in `embkern/ops/x.py` (`backends=("native", "triton")`),
its launcher in that file's `_FORWARD` / `_BACKWARD`, and its name in `embkern/ops/backends.py::KERNELS`.
"""
