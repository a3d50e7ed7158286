"""Tiny models, texts and rows for tests of studies."""

from __future__ import annotations

import transformers as T

from embkern.study import Row

ODD = [
    "<script>x</script>",
    "a|b",
    "new\nline",
    "\u202egnp.exe",
    "שלום",
    "**x**",
    "`y`",
    "\u0301",
    " ",
]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "red", "green", "blue", *ODD]


V, H = 67, 16
SIZES = dict(
    vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
MODELS = {
    "masked": lambda: T.BertForMaskedLM(T.BertConfig(**SIZES)),
    "causal": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)),
    "encoder": lambda: T.BertModel(T.BertConfig(**SIZES)),
}
LINES = ["red green blue", "blue <script> red", "green a|b green red", "blue blue", "red red green"]
FEW = dict(ratios=[1.5, 2], methods=["svd", "allocate", "autoencoder:epochs=2"], progress=False)


def tokenizer() -> T.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "SEP", "UNK", "MASK")}
    return T.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def results(rows: list[Row], measure: str) -> dict:
    """Return the results of a measure by method and ratio."""
    return {(row.method, row.ratio): row.result for row in rows if row.measure == measure}


def steady(rows: list[Row]) -> dict:
    """Return the results by row, without measured times."""
    return {
        row.id: {k: v for k, v in (row.result or {}).items() if k not in ("compress_seconds", "sizes")}
        for row in rows
    }
