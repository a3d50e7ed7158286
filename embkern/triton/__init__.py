"""Triton kernels: one module per op, `_x_kernel` jit functions and `x_forward` launchers.

`launch.py` makes a launch a value, which `aot.py` compiles without a GPU; `tiles.py` holds the tile sizes.
Nothing here is imported, and Triton not loaded, before an op first runs on this backend.
"""
