"""Tiny models of many architectures, built from a config, and a tokenizer made of a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

V, H = 101, 32
_COMMON = dict(
    vocab_size=V, hidden_size=H, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_SEQ2SEQ = dict(
    vocab_size=V, d_model=H, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip


Build = Callable[..., Any]  # may be given a number of layers


def _model(model: str, config: str, **kwargs: Any) -> Build:
    def build(layers: int = 2) -> Any:
        return getattr(T, model)(
            getattr(T, config)(**{**_COMMON, "num_hidden_layers": layers, **kwargs})
        ).eval()

    return build


def _seq2seq(model: str, config: str, **kwargs: Any) -> Build:
    def build(layers: int = 2) -> Any:
        sizes = {**_SEQ2SEQ, "encoder_layers": layers, "decoder_layers": layers}
        return getattr(T, model)(getattr(T, config)(**{**sizes, **kwargs})).eval()

    return build


MODELS: dict[str, Build] = {
    "bert": _model("BertForMaskedLM", "BertConfig"),
    "bert-backbone": _model("BertModel", "BertConfig"),
    "roberta": _model("RobertaForMaskedLM", "RobertaConfig"),
    "distilbert": lambda layers=2: T.DistilBertForMaskedLM(
        T.DistilBertConfig(
            vocab_size=V, dim=H, n_layers=layers, n_heads=4, hidden_dim=48, max_position_embeddings=64
        )
    ).eval(),
    "modernbert": _model("ModernBertForMaskedLM", "ModernBertConfig", cls_token_id=1, sep_token_id=2),
    "albert": _model("AlbertForMaskedLM", "AlbertConfig", embedding_size=16),
    "gpt2": lambda layers=2: T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=V, n_embd=H, n_layer=layers, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ).eval(),
    "llama-tied": _model("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True),
    "llama-untied": _model("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=False),
    "gpt-neox": _model("GPTNeoXForCausalLM", "GPTNeoXConfig"),  # its head has another name in the file
    "qwen3": _model("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True, head_dim=8),
    "gemma3": _model(
        "Gemma3ForCausalLM", "Gemma3TextConfig", tie_word_embeddings=True, head_dim=8, sliding_window=16
    ),
    "t5": lambda layers=2: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=V, d_model=H, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, decoder_start_token_id=0
        )
    ).eval(),
    "opt": _model("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=H),
    "bart": _seq2seq("BartForConditionalGeneration", "BartConfig"),
    "bart-scaled": _seq2seq("BartForConditionalGeneration", "BartConfig", scale_embedding=True),
    "m2m100": _seq2seq("M2M100ForConditionalGeneration", "M2M100Config", scale_embedding=True),
}


def build(name: str, layers: int = 2) -> Any:
    torch.manual_seed(0)
    return MODELS[name](layers)


def tiny_bert(**kwargs: Any) -> Any:
    return _model("BertModel", "BertConfig", **kwargs)()


def gemma3n(**kwargs: Any) -> Any:
    """A model whose per-layer table has fewer rows than its vocabulary, and a scale."""
    torch.manual_seed(0)
    config = dict(
        vocab_size_per_layer_input=V - 6, hidden_size_per_layer_input=H // 2, num_kv_shared_layers=0,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=[48] * 2, laurel_rank=4,
        altup_num_inputs=2, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    model = _model("Gemma3nForCausalLM", "Gemma3nTextConfig", **{**config, **kwargs})()
    with torch.no_grad():
        for parameter in model.parameters():  # its factors of zero ignore the table
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 21).reshape(2, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def word_tokenizer() -> T.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
