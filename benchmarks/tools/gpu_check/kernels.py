"""Every GPU kernel, and the shapes that it is checked at on a device and in a rehearsal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from embkern.ops.reference import NONE

from ...runner import DTYPES
from .head_problems import low_rank_loss, packed_loss, packed_states
from .place import Device
from .problems import (
    ALL_TERMS,
    ROOT_TERMS,
    TWO_TERMS,
    Problem,
    Shape,
    autoencoder,
    lookup,
    loss_of_rows,
    packed,
    scaled_gradient,
)

# Name -> (on a device, in a rehearsal). "few" is decoding, which has its own kernels.
LOOKUPS = {
    "aligned": (Shape(16384, 2048, 256, 128256), Shape(40, 64, 16, 64)),
    "odd": (Shape(4099, 769, 75, 50257), Shape(37, 45, 31, 53)),
    "few": (Shape(4, 2048, 256, 128256), Shape(3, 64, 16, 50)),
}
PACKED = {
    "aligned": (Shape(16384, 768, 128, 30522), Shape(6, 64, 32, 64)),
    "odd": (Shape(5003, 97, 96, 3001), Shape(5, 33, 32, 40)),
    "few": (Shape(4, 768, 128, 30522), Shape(2, 64, 32, 64)),
}
ROWS = {"aligned": (Shape(30522, 768), Shape(16, 64)), "odd": (Shape(4099, 385), Shape(9, 45))}
TABLES = {
    "aligned": (Shape(30522, 768, 64), Shape(16, 64, 16)),
    "odd": (Shape(4099, 777, 63), Shape(19, 45, 13)),
}
FACTOR_HEADS = {
    "aligned": (Shape(2048, 2048, 128, 32000), Shape(40, 64, 16, 64)),
    "odd": (Shape(1003, 769, 75, 5003), Shape(37, 45, 31, 53)),
}
PACKED_HEADS = {
    "aligned": (Shape(1024, 768, 128, 30522), Shape(40, 64, 32, 16)),
    "odd": (Shape(1003, 97, 96, 3001), Shape(37, 33, 32, 13)),
}
PACKED_STATES = {
    "aligned": (Shape(1, 2048, 256, 128256), Shape(1, 64, 32, 64)),
    "odd": (Shape(13, 97, 96, 3001), Shape(5, 33, 32, 40)),
}
Shapes = dict[str, tuple[Shape, Shape]]


def _without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


@dataclass(frozen=True)
class Kernel:
    """One kernel, or the forward and backward of one op: how its problem is made, and at which shapes."""

    name: str
    op: str
    backend: str
    make: Callable[..., Problem]
    shapes: Shapes
    options: dict[str, Any] = field(default_factory=dict)
    device_only: bool = False  # it needs tensors on a device, not only its kernels


@dataclass(frozen=True)
class Case:
    """One kernel at one dtype and shape."""

    kernel: Kernel
    dtype: str
    shape_name: str
    shape: Shape

    @property
    def name(self) -> str:
        """A name that no other case has."""
        return f"{self.kernel.backend} {self.kernel.name} {self.dtype} {self.shape_name}"

    def problem(self, place: Device, seed: int = 0) -> Problem:
        """Make its tensors."""
        make = functools.partial(self.kernel.make, self.kernel.backend, self.shape, DTYPES[self.dtype], place)
        return make(torch.Generator(place.type).manual_seed(seed), **self.kernel.options)


def cases(place: Device) -> Iterator[Case]:
    """Yield every case that a place can run, in the order of the table below."""
    for kernel in KERNELS:
        if kernel.device_only and place.rehearsal:
            continue
        for dtype in place.dtypes(kernel.backend):
            for name, sizes in kernel.shapes.items():
                yield Case(kernel, dtype, name, sizes[place.rehearsal])


_ALL = dict(terms=ALL_TERMS, autograd=True)
_EVERYTHING = dict(terms=ALL_TERMS, reduction=NONE, everything=True)
KERNELS = (
    Kernel("gather_project", "gather_project", "triton", lookup, LOOKUPS, dict(what="forward")),
    Kernel(
        "gather_project out", "gather_project", "triton", lookup, _without(LOOKUPS, "few"), dict(what="out")
    ),
    Kernel("gather_project backward", "gather_project", "triton", lookup, LOOKUPS, dict(what="backward")),
    Kernel(
        "gather_project sparse backward",
        "gather_project",
        "triton",
        lookup,
        _without(LOOKUPS, "few"),
        dict(what="sparse backward"),
    ),
    Kernel("gather_decode", "gather_decode", "triton", packed, PACKED, dict(what="forward")),
    Kernel(
        "gather_decode both",
        "gather_decode",
        "triton",
        packed,
        _without(PACKED, "few"),
        dict(what="autograd"),
    ),
    Kernel("cosine_mse", "cosine_mse", "triton", loss_of_rows, ROWS, dict(terms=TWO_TERMS)),
    Kernel("cosine_mse root", "cosine_mse", "triton", loss_of_rows, ROWS, dict(terms=ROOT_TERMS)),
    Kernel("cosine_mse everything", "cosine_mse", "triton", loss_of_rows, ROWS, _EVERYTHING),
    Kernel(
        "cosine_mse both", "cosine_mse", "triton", loss_of_rows, ROWS, dict(terms=ALL_TERMS, autograd=True)
    ),
    Kernel("scale_gradient_", "cosine_mse", "triton", scaled_gradient, ROWS, dict(by_row=False)),
    Kernel("scale_gradient_ by row", "cosine_mse", "triton", scaled_gradient, ROWS, dict(by_row=True)),
    Kernel("autoencoder in r", "autoencoder", "triton", autoencoder, TABLES, dict(by_gram=True)),
    Kernel("autoencoder by rows", "autoencoder", "triton", autoencoder, TABLES, dict(by_gram=False)),
    Kernel(
        "autoencoder both", "autoencoder", "triton", autoencoder, TABLES, dict(by_gram=True, autograd=True)
    ),
    Kernel("low_rank_cross_entropy both", "low_rank_cross_entropy", "triton", low_rank_loss, FACTOR_HEADS),
    Kernel("packed_cross_entropy both", "packed_cross_entropy", "triton", packed_loss, PACKED_HEADS),
    Kernel("gather_project", "gather_project", "native", lookup, LOOKUPS, dict(what="forward")),
    Kernel(
        "gather_project out", "gather_project", "native", lookup, _without(LOOKUPS, "few"), dict(what="out")
    ),
    Kernel("gather_project backward", "gather_project", "native", lookup, LOOKUPS, dict(what="backward")),
    Kernel(
        "gather_project sparse backward",
        "gather_project",
        "native",
        lookup,
        _without(LOOKUPS, "few"),
        dict(what="sparse backward"),
    ),
    Kernel(
        "gather_project both",
        "gather_project",
        "native",
        lookup,
        LOOKUPS,
        dict(what="autograd"),
        device_only=True,
    ),
    Kernel("gather_decode", "gather_decode", "native", packed, PACKED, dict(what="forward")),
    Kernel(
        "gather_decode both",
        "gather_decode",
        "native",
        packed,
        _without(PACKED, "few"),
        dict(what="autograd"),
        device_only=True,
    ),
    Kernel("packed_logits", "packed_logits", "native", packed_states, PACKED_STATES),
    Kernel("scale_gradient_", "cosine_mse", "native", scaled_gradient, ROWS, dict(by_row=False)),
    Kernel("scale_gradient_ by row", "cosine_mse", "native", scaled_gradient, ROWS, dict(by_row=True)),
    Kernel("cosine_mse", "cosine_mse", "native", loss_of_rows, ROWS, dict(terms=TWO_TERMS)),
    Kernel("cosine_mse root", "cosine_mse", "native", loss_of_rows, ROWS, dict(terms=ROOT_TERMS)),
    Kernel("cosine_mse everything", "cosine_mse", "native", loss_of_rows, ROWS, _EVERYTHING),
    Kernel(
        "cosine_mse both",
        "cosine_mse",
        "native",
        loss_of_rows,
        ROWS,
        _ALL,
        device_only=True,
    ),
)
