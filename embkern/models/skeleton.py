"""A compressed model that ``from_config`` makes on the meta device, for accelerate to load a checkpoint into.

transformers calls quantizers in ``from_pretrained`` only: from a config it makes a dense model, into which
the tensors of a compressed one do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .checkpoint import verify
from .config import EmbkernConfig
from .quantizer import EmbkernQuantizer, adopt, own_config
from .swap import compressed_models, table_modules, table_roots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_skeleton(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Replace the tables of a model on the meta device by compressed ones, in place; others are left alone.

    Args:
        model: a dense model.
        described: the ``quantization_config`` of its config.
    """
    config = EmbkernConfig(**described)
    if not config.states or not all(parameter.is_meta for parameter in model.parameters()):
        return
    quantizer = EmbkernQuantizer(config, pre_quantized=True)
    own_config(model)
    quantizer._process_model_before_weight_loading(model)
    roots = table_roots(model)
    for module in table_modules(model):  # init_empty_weights copies each parameter that is registered
        shared = roots[module.table_name]._parameters
        module._parameters.update({name: shared[name] for name in module.tensor_names if name in shared})
    adopt(model, quantizer)
    _FirstForward(model)


class _FirstForward:
    """Completes a model before its first lookup: modules share the codes, and the tables are verified.

    accelerate ties parameters after it has loaded them, but no buffers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.roots, self.states = table_roots(model), model.hf_quantizer.quantization_config.states
        self.modules = table_modules(model)
        codes = {name for root in self.roots.values() for name in root._buffers}
        self.ties = [(each, each._tied_weights_keys) for each in compressed_models(model)]
        for each, ties in self.ties:  # tie_weights finds no codes in the heads
            kept = {
                target: source for target, source in ties.items() if target.rpartition(".")[2] not in codes
            }
            each._tied_weights_keys = kept
        self.handles = [module.register_forward_pre_hook(self) for module in self.modules]

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do so, once."""
        tensors = [tensor for root in self.roots.values() for tensor in root.tensors().values()]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                "model: its compressed table is offloaded, or was not loaded; "
                "from_pretrained(DIRECTORY, device_map=...) loads a compressed model with any device map"
            )
        for handle in self.handles:
            handle.remove()
        for root in self.roots.values():
            root.cast_to_held()
        for follower in self.modules:
            follower.share_codes(self.roots[follower.table_name])
        for each, ties in self.ties:
            each._tied_weights_keys = ties
        for name, root in self.roots.items():
            verify(root, self.states[name])
