"""``NonlinearTable``: a table that a network of three layers decodes from narrow codes and row norms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import RowTable, expect_shape

LAYERS = ("layer_1", "shift_1", "layer_2", "shift_2", "layer_3", "shift_3")


@dataclass(frozen=True, eq=False)
class NonlinearTable(RowTable):
    """A (V, H) table of codes of width r and the norm of each row, decoded by three layers.

    ``y = norms[i] * F.normalize(tanh(f3(leaky_relu(f2(leaky_relu(f1(latents[i])))))))`` with
    ``f_k(x) = F.linear(x, layer_k, shift_k)``; without norms, y is the value of the tanh.

    Attributes:
        latents: (V, r), floating-point.
        norms: (V,), or None.
        layer_1, shift_1: (a, r) and (a,).
        layer_2, shift_2: (b, a) and (b,).
        layer_3, shift_3: (H, b) and (H,).
    """

    kind: ClassVar[str] = "nonlinear"
    required: ClassVar[tuple[str, ...]] = ("latents", *LAYERS)
    optional: ClassVar[tuple[str, ...]] = ("norms",)
    per_row: ClassVar[tuple[str, ...]] = ("latents", "norms")

    latents: Tensor
    layer_1: Tensor
    shift_1: Tensor
    layer_2: Tensor
    shift_2: Tensor
    layer_3: Tensor
    shift_3: Tensor
    norms: Tensor | None = None

    def _check_layout(self) -> None:
        V, H = self.num_embeddings, self.embedding_dim
        if self.latents.dim() != 2:
            raise ValueError(f"latents: expected shape ({V}, r), got {tuple(self.latents.shape)}")
        expect_shape("latents", self.latents, (V, self.latents.shape[1]))
        expect_shape("norms", self.norms, (V,))
        widths = (self.latents.shape[1], self.shift_1.numel(), self.shift_2.numel(), H)
        for number in (1, 2, 3):
            layer, shift = getattr(self, f"layer_{number}"), getattr(self, f"shift_{number}")
            expect_shape(f"layer_{number}", layer, (widths[number], widths[number - 1]))
            expect_shape(f"shift_{number}", shift, (widths[number],))

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        layers = [getattr(self, name).to(dtype) for name in LAYERS]
        norms = None if self.norms is None else self.norms.index_select(0, ids).to(dtype).unsqueeze(1)
        return decoded(self.latents.index_select(0, ids).to(dtype), norms, layers)

    def take(self, ids: Tensor) -> NonlinearTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        norms = None if self.norms is None else self.norms[ids]
        return dataclasses.replace(
            self, latents=self.latents[ids], norms=norms, num_embeddings=len(ids), check=False
        )


def decoded(latents: Tensor, norms: Tensor | None, layers: list[Tensor]) -> Tensor:
    """Return the rows (n, H) of latents (n, r), by weight and bias of each layer; norms: (n, 1) or None."""
    values = latents
    for weight, shift in zip(layers[0:4:2], layers[1:4:2], strict=True):
        values = F.leaky_relu(F.linear(values, weight, shift))
    rows = F.linear(values, *layers[4:]).tanh()
    return rows if norms is None else norms * F.normalize(rows, eps=1e-30)
