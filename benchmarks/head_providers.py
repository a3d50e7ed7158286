"""The models that `generate` times: dense, with a quantised output head, and compressed by embkern.

Rivals quantise the head alone, as their libraries offer it; the input embedding stays dense, so that a tied
model then holds its table twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import embkern  # noqa: F401 (registers the saved format)
from embkern.models.loading import load_model

GROUP = 32  # values that share a scale in 4-bit heads


class Provider(NamedTuple):
    """How to load a model.

    Attributes:
        load: returns the model of a directory; that of the compressed model for embkern.
        package: the package that it needs, if any.
        head_only: it differs from the dense model in the head alone, so that encoders have none.
    """

    load: Callable[[Path], Any]
    package: str | None = None
    head_only: bool = False

    def reason(self) -> str | None:
        """Return why it cannot run here, or None."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"


def _dense(directory: Path) -> Any:
    return load_model(directory).eval().requires_grad_(False)


def _bf16(directory: Path) -> Any:
    return _dense(directory).bfloat16()


def _with_head(directory: Path, quantized: Callable[[Tensor], nn.Module]) -> Any:
    """Load a model and replace its head by one that is made of the weight (V, H)."""
    model = _dense(directory)
    model.set_output_embeddings(quantized(model.get_output_embeddings().weight.detach()))
    return model


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _qint8(weight: Tensor) -> nn.Module:
    module = nn.Sequential(_linear(weight))
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)[0]


def _torchao(config: Callable[[Any], Any]) -> Callable[[Tensor], nn.Module]:
    """Quantise by the config that ``config`` makes of the module torchao.quantization."""

    def quantized(weight: Tensor) -> nn.Module:
        import torchao.quantization as torchao

        module = nn.Sequential(_linear(weight.clone()))
        torchao.quantize_(module, config(torchao))
        return module[0]

    return quantized


def _torchao_int4(torchao: Any) -> Any:
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))  # type: ignore[attr-defined]


def _bitsandbytes(kind: str) -> Callable[[Tensor], nn.Module]:
    def quantized(weight: Tensor) -> nn.Module:
        import bitsandbytes as bnb

        V, H = weight.shape
        if kind == "nf4":
            linear = bnb.nn.LinearNF4(H, V, bias=False, compute_dtype=torch.float32)
        else:
            linear = bnb.nn.Linear8bitLt(H, V, bias=False, has_fp16_weights=False)
        linear.load_state_dict({"weight": weight})
        return linear.to("cpu").eval()

    return quantized


class _OnnxHead(nn.Module):
    """``h @ weight.t()`` by onnxruntime's MatMulNBits at 4 bits, with an fp32 scale per group of 32."""

    def __init__(self, weight: Tensor) -> None:
        import onnx
        import onnxruntime

        super().__init__()
        V, H = weight.shape
        groups = weight.view(V, H // GROUP, GROUP)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign, as in Q4_0
        scales = largest / -8
        codes = (groups / scales.where(scales != 0, 1)).round().clamp(-8, 7).add(8).to(torch.uint8)
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        tensors = [("codes", packed.numpy()), ("scales", scales.reshape(-1).numpy())]
        node = onnx.helper.make_node(
            "MatMulNBits", ["hidden", "codes", "scales"], ["logits"], domain="com.microsoft",
            K=H, N=V, bits=4, block_size=GROUP, accuracy_level=4,
        )  # fmt: skip
        float32 = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node], "head", [onnx.helper.make_tensor_value_info("hidden", float32, ["n", H])],
            [onnx.helper.make_tensor_value_info("logits", float32, ["n", V])],
            [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in tensors],
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (``*``, V) of hidden states (``*``, H)."""
        (logits,) = self.session.run(None, {"hidden": hidden.reshape(-1, hidden.shape[-1]).numpy()})
        return torch.from_numpy(logits).view(*hidden.shape[:-1], -1)


def _head(quantized: Callable[[Tensor], nn.Module], package: str | None = None) -> Provider:
    return Provider(lambda directory: _with_head(directory, quantized), package, head_only=True)


PROVIDERS: dict[str, Provider] = {
    "dense-fp32": Provider(_dense),
    "dense-bf16": Provider(_bf16),
    "embkern": Provider(_dense),
    "qint8": _head(_qint8),
    "torchao-int8": _head(_torchao(lambda torchao: torchao.Int8WeightOnlyConfig()), "torchao"),
    "torchao-int4": _head(_torchao(_torchao_int4), "torchao"),
    "bitsandbytes-int8": _head(_bitsandbytes("int8"), "bitsandbytes"),
    "bitsandbytes-nf4": _head(_bitsandbytes("nf4"), "bitsandbytes"),
    "onnxruntime-int4": _head(_OnnxHead, "onnxruntime"),
}
