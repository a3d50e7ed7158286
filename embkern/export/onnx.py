"""A compressed model as one ONNX file, whose table stays compressed and is decoded by ONNX operators."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..io.atomic import new_file, replacing
from ..io.optional import require
from ..models.inference import evaluating, longest_input
from ..models.loading import load_compressed
from ..models.swap import tables_of
from ..ops import DECOMPOSITIONS
from ..tables.kept_rows import KeptRowsTable
from .block_quantized import check_bits, use_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET = 18  # the first with bitwise operators
# Larger constants are left to the runtime to compute: the exporter would write the addresses of all rows.
_FOLDED_ELEMENTS = 4096
_EXAMPLE = (2, 6)  # batch and length of the input that is traced
_MOST_BYTES = 2**31 - 2**20  # protobuf's limit for one file is 2 GiB


def export_onnx(
    directory: str | os.PathLike,
    output: str | os.PathLike,
    *,
    bits: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a compressed model as one ONNX file, whose table stays compressed.

    Inputs are ``input_ids`` and ``attention_mask`` (batch, sequence), and ``decoder_input_ids`` (batch,
    target) of an encoder-decoder. The output is ``logits`` of a model with a head, else
    ``last_hidden_state``. There is no cache of keys and values. A model in bfloat16, which runtimes on CPU do
    not take, is written in float32.

    Args:
        directory: a compressed model: a directory, or a name on the hub.
        output: the file to write.
        bits: None keeps the table as it is, to be decoded by standard operators. 4 or 8 rounds its rows to so
            many bits, in blocks of 32 values with a scale, for onnxruntime's own operators
            (GatherBlockQuantized and MatMulNBits); the model is then written in float32.
        overwrite: whether to replace an existing file.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the model is not compressed by embkern, or larger than the 2 GiB of one ONNX file; its
            table refuses tokens that it does not store (``unknown="error"``), which ONNX cannot; or ``bits``
            is neither 4 nor 8.
        FileExistsError: ``output`` exists and may not be replaced.
        ImportError: a package of ``embkern[interop]`` is missing.
        OSError: ``output`` cannot be written.
    """
    require("onnxscript", "interop")
    if bits is not None:
        check_bits(bits)
    new_file(output, overwrite)
    model = load_compressed(directory)
    _check_unknown(model)
    if bits is not None or model.dtype == torch.bfloat16:
        model.float()
    if bits is not None:
        use_blocks(model, bits)
    stored = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    if stored > _MOST_BYTES:
        raise ValueError(f"model: expected less than {_MOST_BYTES:,} bytes in one ONNX file, got {stored:,}")
    program = onnx_program(model)
    with replacing(output) as temporary:
        program.save(temporary)


def onnx_program(model: PreTrainedModel) -> torch.onnx.ONNXProgram:
    """Return the ONNX program of a compressed model, without what the exporter notes about its sources."""
    inputs = _inputs(model)
    model.set_attn_implementation("eager")  # Torch's fused attention has strides that the exporter fails on.
    with evaluating(model), torch.no_grad():
        output = "logits" if "logits" in model(**inputs) else "last_hidden_state"
        program = torch.export.export(
            _Inference(model, output),
            (),
            inputs,
            dynamic_shapes=_shapes(model),
            strict=False,
        ).run_decompositions(
            {**DECOMPOSITIONS, torch.ops.aten.searchsorted.Tensor: _smaller}  # which ONNX lacks
        )
    exported: Any = torch.onnx.export(
        program, (), input_names=list(inputs), output_names=[output], opset_version=OPSET, dynamo=True,
        optimize=False, verbose=False,
    )  # fmt: skip
    require("onnxscript.optimizer", "interop").optimize(exported.model, output_size_limit=_FOLDED_ELEMENTS)
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which name the files of this machine
    for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        value.metadata_props.clear()
    return exported


def _smaller(ascending: Tensor, values: Tensor, **options: Any) -> Tensor:
    """Return how many numbers of ``ascending`` (K,) are smaller than each of the values, by binary search.

    This is ``torch.searchsorted`` in log2 of K gathers, of operators that ONNX has.
    """
    found, step = torch.zeros_like(values, dtype=torch.int64), 1 << (len(ascending).bit_length() - 1)
    while step:
        more = found + step
        place = (more - 1).clamp_max(len(ascending) - 1)
        smaller = ascending.index_select(0, place.flatten()).view_as(values) < values
        found = torch.where((more <= len(ascending)) & smaller, more, found)
        step //= 2
    return found


def _check_unknown(model: PreTrainedModel) -> None:
    """Raise ValueError if a table of a model refuses the tokens that it does not store."""
    for modules in tables_of(model).values():
        table = modules[0].table
        if isinstance(table, KeptRowsTable) and table.unknown == "error":
            raise ValueError(
                "model: expected a table with a row for every token, got one that refuses those it does not "
                "store (unknown='error'), which ONNX cannot; prune with unknown mean or nearest"
            )


class _Inference(nn.Module):
    """A model as a function of its inputs to one of its outputs."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        more = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        output: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)[self.output]
        return output


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return an example input."""
    embedding: Any = model.get_input_embeddings()
    batch, length = _EXAMPLE
    ids = (torch.arange(batch * length) % embedding.num_embeddings).view(batch, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, 1:].contiguous()
    return inputs


def _shapes(model: PreTrainedModel) -> dict[str, dict[int, Any]]:
    """Return which dimensions of the inputs are free, and up to which length."""
    longest = longest_input(model)
    batch = torch.export.Dim("batch", min=1)
    sequence, target = (torch.export.Dim(name, min=1, max=longest) for name in ("sequence", "target"))
    shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
    if model.config.is_encoder_decoder:
        shapes["decoder_input_ids"] = {0: batch, 1: target}
    return shapes
