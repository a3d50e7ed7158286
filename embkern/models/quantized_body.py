"""Models whose linear layers another library quantises, beside the tables that embkern compresses.

A model of transformers has one quantiser and one ``quantization_config``. Of such a model they are embkern's,
whose config has that of the other library as ``body``. ``BodyQuantizer`` passes on to that library's own
quantiser what concerns the other layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.quantizers.base import HfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Steps of loading in which the quantiser of the body decides, as far as the release of transformers has them.
_OF_THE_BODY = (
    "adjust_max_memory",
    "get_load_operations",
    "get_new_dtype",
    "get_quantize_ops",
    "get_weight_conversions",
    "param_element_size",
    "param_needs_quantization",
    "update_attn_implementation",
    "update_device_map",
    "update_dtype",
    "update_parallel_plan",
    "update_weight_conversions",
    "validate_environment",
)


class BodyQuantizer(HfQuantizer):
    """A quantiser that leaves all layers but the embeddings to the quantiser of another library.

    Attributes:
        body: that quantiser, or None if nothing else quantises the model.
        stored: whether the model has been saved with compressed tables, while ``pre_quantized`` says whether
            its weights are to be loaded as they are, without being quantised.
    """

    body: HfQuantizer | None = None
    pre_quantized: bool

    def __init__(self, quantization_config: Any, *, body: HfQuantizer | None = None, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config.body
        if body is None and config is not None:
            from transformers.quantizers.auto import AutoHfQuantizer

            loads = self.pre_quantized and not quantization_config.quantizes_body
            body = AutoHfQuantizer.from_config(config, pre_quantized=loads)
        self.body, self.stored = body, self.pre_quantized
        if body is not None:
            self.pre_quantized = body.pre_quantized

    def prepare_body(self, model: PreTrainedModel, **options: Any) -> None:
        """Make the layers of a model on the meta device those that the body's weights are loaded into."""
        if self.body is None:
            return
        if self.body.pre_quantized:
            self.body._convert_model_for_quantization(model)
        self.body._process_model_before_weight_loading(model, **options)

    def finish_body(self, model: PreTrainedModel, **options: Any) -> None:
        """Do what the body needs after its weights are loaded."""
        if self.body is not None:
            self.body._process_model_after_weight_loading(model, **options)

    def with_body(
        self, state_dict: dict[str, Tensor], model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return a state dict to save in the form that the body's weights have in files, and its metadata."""
        if self.body is None:
            return state_dict, {}
        found, metadata = self.body.get_state_dict_and_metadata(_WithState(model, state_dict))
        return state_dict if found is None else found, metadata

    def mark(self, model: PreTrainedModel) -> None:
        """Set the flags by which transformers refuses what a quantised model cannot do.

        With compressed tables alone a model can do all of it: ``half()``, ``float()``, and Trainer.
        transformers cannot save what it has loaded by operations of a quantiser, which have no reverse, in
        the format of the file. They are removed from the model: the state dict has that format already.
        """
        if self.body is not None and getattr(model, "_weight_conversions", None):
            model._weight_conversions = [
                each
                for each in model._weight_conversions
                if not any(
                    hasattr(operation, "hf_quantizer") for operation in getattr(each, "operations", ())
                )
            ] or None
        model.is_quantized = self.body is not None
        method = self.quantization_config if self.body is None else self.body.quantization_config
        model.quantization_method = method.quant_method

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove the quantiser from a model without compressed tables; that of its body takes its place."""
        super().remove_quantization_config(model)
        if self.body is not None:
            model.hf_quantizer = self.body
            model.config.quantization_config = self.body.quantization_config
            self.mark(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether the body can be saved; the tables are ordinary parameters and buffers."""
        return self.body is None or bool(self.body.is_serializable(*args, **kwargs))

    @property
    def is_trainable(self) -> bool:
        """Whether the body is trainable; the tables are after ``unfreeze_table``."""
        return self.body is None or bool(self.body.is_trainable)

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the model without an adapter."""
        return self.body is None or bool(self.body.is_qat_trainable)

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile traces the model; it traces the lookup without graph breaks."""
        return self.body is None or bool(self.body.is_compileable)


class _WithState:
    """A model with another state dict."""

    def __init__(self, model: PreTrainedModel, state_dict: dict[str, Tensor]) -> None:
        self._model, self._state_dict = model, state_dict

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state_dict


def _passed_on(name: str) -> Any:
    own = getattr(HfQuantizer, name)

    def method(self: BodyQuantizer, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs) if self.body is None else getattr(self.body, name)(*args, **kwargs)

    method.__name__, method.__doc__ = (
        name,
        f"Return what the quantiser of the body does; see HfQuantizer.{name}.",
    )
    return method


for _name in _OF_THE_BODY:
    if hasattr(HfQuantizer, _name):
        setattr(BodyQuantizer, _name, _passed_on(_name))
