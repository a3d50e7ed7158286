"""A compressed language model as a GGUF file, its table in GGML's blocks of 4 or 8 bits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.atomic import new_file, replacing
from ..io.optional import require
from ..models.loading import load_compressed
from .block_quantized import BLOCK, check_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The architectures of GGUF by transformers' model types.
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_TABLE = {4: "Q4_0", 8: "Q8_0"}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export_gguf(
    directory: str | os.PathLike, output: str | os.PathLike, *, bits: int = 8, overwrite: bool = False
) -> None:
    """Write a compressed causal language model as a GGUF file without a tokenizer.

    The decoded rows are rounded to Q4_0 or Q8_0: blocks of 32 values of 4 or 8 bits with a scale of float16.
    The other weights keep their dtype. ``AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)`` reads
    the file.

    Args:
        directory: a compressed model: a directory, or a name on the hub.
        output: the file to write.
        bits: 4 or 8, of the values of the table.
        overwrite: whether to replace an existing file.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the model is not compressed by embkern, its architecture, its rotary embedding or the
            width of its table has no form in GGUF here, or ``bits`` is neither 4 nor 8.
        FileExistsError: ``output`` exists and may not be replaced.
        ImportError: the package gguf is missing.
        OSError: ``output`` cannot be written.
    """
    gguf = require("gguf", "interop")
    check_bits(bits)
    new_file(output, overwrite)
    model = load_compressed(directory)
    _check_model(model)
    name = ARCHITECTURES[model.config.model_type]
    architecture = getattr(gguf.MODEL_ARCH, name)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    state = model.dequantize().state_dict()
    with replacing(output) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _describe(writer, model.config)
        for key, tensor in state.items():
            if key == "lm_head.weight" and tied:
                continue
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ValueError(f"model: {key} has no name in GGUF's architecture {name}")
            stored = _stored(gguf, key, tensor, model.config, bits)
            writer.add_tensor(target, stored[0], raw_dtype=stored[1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_model(model: PreTrainedModel) -> None:
    """Raise ValueError if a model has no form in GGUF here."""
    config: Any = model.config
    if config.model_type not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"model: expected a causal language model of type {known}, got {type(model).__name__}; "
            "export it to dense and convert that"
        )
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) != "default":
        raise ValueError(f"model: expected a rotary embedding of type 'default', got {kind!r}")
    if config.hidden_size % BLOCK:
        raise ValueError(f"model: expected rows of a multiple of {BLOCK} values, got {config.hidden_size}")


def _describe(writer: Any, config: Any) -> None:
    """Write the metadata from which a reader builds the model."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _stored(gguf: Any, key: str, tensor: Tensor, config: Any, bits: int) -> tuple[Any, Any]:
    """Return a tensor as GGUF stores it, and its type there."""
    kinds = gguf.GGMLQuantizationType
    values = tensor.float().numpy()
    if key.endswith("embed_tokens.weight"):
        kind = kinds[_TABLE[bits]]
    elif tensor.dim() == 1:  # GGML multiplies and adds vectors in float32
        kind = kinds.F32
    else:
        kind = kinds[_DTYPES[tensor.dtype]]
    if config.model_type == "llama":
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in key:  # GGML rotates neighbours, transformers the halves of a head
                pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
    return gguf.quants.quantize(values, kind), kind
