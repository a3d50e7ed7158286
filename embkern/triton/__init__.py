"""Triton kernels: one module or package per op, with `_x_kernel` jit functions and their launchers.

`launch.py` represents a launch as a value, which `aot.py` compiles without a GPU; `tiles.py` holds the tile
sizes. Neither these modules nor Triton are imported before an op first runs on this backend.
"""
