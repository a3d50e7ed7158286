"""A table of 4 or 8 bits in blocks with a scale each, and its lookup and head in operators of onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.swap import tables_of
from ..nn.base import CompressedEmbedding
from ..nn.table_module import TableModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = (4, 8)
BLOCK = 32  # values that share a scale
_ROWS = 8192  # rows that are decoded at a time


class BlockTable(NamedTuple):
    """Codes (V, blocks, 32 bits / 8) uint8 and scales (V, blocks): ``(code - 2**(bits - 1)) * scale``.

    Of 4 bits, the even of two codes is in the low half of a byte. Rows are padded to whole blocks.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    width: int


def check_bits(bits: int) -> None:
    """Raise ValueError unless there are tables of so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits!r}")


@torch.no_grad()
def block_table(module: TableModule, bits: int) -> BlockTable:
    """Decode the table of an embedding or a head, a piece at a time, and round it to codes of 4 or 8 bits.

    The value of largest magnitude of a block has the lowest code, which is exact (as in GGML's Q4_0).
    """
    rows, width = module.shape
    device = next(module.parameters()).device
    pieces = [
        _rounded(module._rows(ids).float(), bits) for ids in torch.arange(rows, device=device).split(_ROWS)
    ]
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return BlockTable(codes, scales, bits, width)


def _rounded(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    middle = 2 ** (bits - 1)
    blocks = nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scales = largest / -middle
    steps = torch.where(scales == 0, 0, blocks / scales)
    codes = (steps.round() + middle).clamp(0, 2 * middle - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[:, :, ::2] | codes[:, :, 1::2] << 4
    return codes, scales.squeeze(2)


def use_blocks(model: PreTrainedModel, bits: int) -> None:
    """Replace a model's compressed embeddings and heads by operators over tables of blocks, in place."""
    made: dict[int, _Lookup | _Head] = {}
    for modules in tables_of(model).values():
        table = block_table(modules[0], bits)
        codes, scales = (nn.Parameter(each, requires_grad=False) for each in (table.codes, table.scales))
        for module in modules:
            if isinstance(module, CompressedEmbedding):
                made[id(module)] = _Lookup(codes, scales, table, module.scale)
            else:
                made[id(module)] = _Head(codes, scales, table, module.bias)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            model.set_submodule(name, made[id(module)])


class _Blocks(nn.Module):
    """Holds a table; the output of its operators is zero without an exporter."""

    def __init__(self, codes: nn.Parameter, scales: nn.Parameter, table: BlockTable) -> None:
        super().__init__()
        self.codes, self.scales = codes, scales
        self.num_embeddings, self.width = len(codes), table.width
        self.attributes = {"bits": table.bits, "block_size": BLOCK}

    def operator(self, name: str, inputs: tuple[Tensor, ...], shape: Any, **attributes: int) -> Tensor:
        """Return the output of an operator of onnxruntime."""
        attrs: dict[str, Any] = {**attributes, **self.attributes}
        output: Tensor = torch.onnx.ops.symbolic(
            f"com.microsoft::{name}", inputs, attrs, dtype=torch.float32, shape=shape, version=1
        )
        return output


class _Lookup(_Blocks):
    def __init__(self, codes: nn.Parameter, scales: nn.Parameter, table: BlockTable, scale: float) -> None:
        super().__init__(codes, scales, table)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        inputs, shape = (self.codes.flatten(1), ids, self.scales), (*ids.shape, self.scales.shape[1] * BLOCK)
        rows = self.operator("GatherBlockQuantized", inputs, shape, gather_axis=0, quantize_axis=1)
        return rows[..., : self.width] * self.scale


class _Head(_Blocks):
    def __init__(
        self, codes: nn.Parameter, scales: nn.Parameter, table: BlockTable, bias: nn.Parameter | None
    ) -> None:
        super().__init__(codes, scales, table)
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        inputs, shape = (hidden, self.codes, self.scales), (*hidden.shape[:-1], self.num_embeddings)
        logits = self.operator("MatMulNBits", inputs, shape, K=self.width, N=self.num_embeddings)
        return logits if self.bias is None else logits + self.bias
