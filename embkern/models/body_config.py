"""The config of a model's body, the linear layers that another library quantises beside compressed tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "embkern"  # also in embkern._registration, which imports nothing
BODIES = ("bitsandbytes", "torchao")  # methods of the bodies that are tested


def method_of(config: QuantizationConfigMixin) -> str:
    """Return the quantisation method of a config as text."""
    method = config.quant_method
    return str(getattr(method, "value", method))


def parse_body(body: QuantizationConfigMixin | dict[str, Any] | None) -> QuantizationConfigMixin | None:
    """Return the config of a body, given as such or as ``config.json`` has it.

    Raises:
        ValueError: it is that of a method other than ``BODIES``, damaged, or needs a library that is not
            installed.
    """
    if body is None:
        return None
    method = body.get("quant_method") if isinstance(body, dict) else getattr(body, "quant_method", None)
    method = getattr(method, "value", method)
    if method not in BODIES:
        got = repr(body) if method is None else repr(str(method))
        raise ValueError(
            f"quantization_config.body: expected a config of transformers for {' or '.join(BODIES)}, "
            f"got {got}"
        )
    if isinstance(body, QuantizationConfigMixin):
        return body
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(body)
    except Exception as error:  # an ImportError, or what the library raises for values that it does not know
        raise ValueError(
            f"quantization_config.body: the config for {method} cannot be read, which needs {method} to be "
            f"installed ({error})"
        ) from error


def body_as_json(body: QuantizationConfigMixin | None) -> dict[str, Any] | None:
    """Return the config of a body as ``config.json`` has it."""
    return None if body is None else json.loads(json.dumps(body.to_dict(), default=str))


def is_compressed(model: PreTrainedModel) -> bool:
    """Return whether the quantiser of a model is embkern's: those of other libraries know no tables."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer is not None and method_of(quantizer.quantization_config) == QUANT_METHOD


def body_of(model: PreTrainedModel) -> Any:
    """Return the quantiser (``HfQuantizer``) of another library that quantised a model's layers, or None."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer.body if is_compressed(model) else quantizer


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that one of a subclass, such as torchao's, consists of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names: Any = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in plain_parts(getattr(tensor, name))]
