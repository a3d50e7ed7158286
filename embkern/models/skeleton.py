"""A compressed model that ``from_config`` makes on the meta device, for accelerate to load a checkpoint into.

transformers calls quantizers in ``from_pretrained`` only: from a config it makes a dense model, into which
the tensors of a compressed one do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt
from torch import nn

from .checkpoint import verify
from .config import EmbkernConfig
from .quantizer import EmbkernQuantizer, adopt, own_config
from .swap import compressed_embedding, compressed_models, modules_of_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def extend_from_config(modeling: Any) -> None:
    """Let ``from_config`` make skeletons; ``modeling`` is ``transformers.modeling_utils``."""
    if hasattr(modeling, "PreTrainedModel"):  # Else the module is being imported right now.
        wrapt.wrap_function_wrapper(modeling, "PreTrainedModel._from_config", _from_config)


def _from_config(make: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreTrainedModel:
    """Make a model; if its config is that of a compressed one, and it is on meta, with compressed modules."""
    model: PreTrainedModel = make(*args, **kwargs)
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, dict) or described.get("quant_method") != "embkern":
        return model
    config = EmbkernConfig(**described)
    if config.table is None or not all(parameter.is_meta for parameter in model.parameters()):
        return model
    quantizer = EmbkernQuantizer(config, pre_quantized=True)
    own_config(model)
    quantizer._process_model_before_weight_loading(model)
    root = compressed_embedding(model)
    for follower in modules_of_table(model):  # init_empty_weights copies each parameter that is registered
        follower._parameters.update(root._parameters)
    adopt(model, quantizer)
    _FirstForward(model)
    return model


class _FirstForward:
    """Completes a model before its first lookup: heads share the codes, and the table is verified.

    accelerate ties parameters after it has loaded them, but no buffers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.root, self.state = compressed_embedding(model), model.hf_quantizer.quantization_config.table
        self.modules = modules_of_table(model)
        self.ties = [(each, each._tied_weights_keys) for each in compressed_models(model)]
        for each, ties in self.ties:  # tie_weights finds no codes in the heads
            codes = {target for target in ties if target.rpartition(".")[2] in self.root._buffers}
            each._tied_weights_keys = {target: ties[target] for target in ties if target not in codes}
        self.handles = [module.register_forward_pre_hook(self) for module in self.modules]

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do so, once."""
        if any(tensor.is_meta for tensor in self.root.tensors().values()):
            raise ValueError(
                "model: its compressed table is offloaded, or was not loaded; "
                "from_pretrained(DIRECTORY, device_map=...) loads a compressed model with any device map"
            )
        for handle in self.handles:
            handle.remove()
        self.root.cast_to_held()
        for follower in self.modules:
            follower.share_codes(self.root)
        for each, ties in self.ties:
            each._tied_weights_keys = ties
        verify(self.root, self.state)
