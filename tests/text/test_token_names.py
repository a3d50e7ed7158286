"""Names of tokens: text as a reader sees it, for three kinds of vocabularies."""

from __future__ import annotations

import pytest

T = pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from embkern.text.token_names import TokenName, token_names
from tests.example_tokenizers import byte_level, wordpiece


def names_of(tokenizer, *pieces: str) -> list[TokenName]:
    return token_names(tokenizer, tokenizer.convert_tokens_to_ids(list(pieces)))


def test_pieces_of_bytes_are_decoded():
    vocabulary = {"Ġ": 0, "Ġthru": 1, "âĢĿ)": 2, "âĢ": 3, "Ċ": 4, "a": 5, "<|reserved_special_token_7|>": 6}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = T.PreTrainedTokenizerFast(tokenizer_object=raw)
    made.add_special_tokens({"eos_token": "<|end|>"})
    assert [str(name) for name in token_names(made, range(9))] == [
        "␣", "␣thru", "”)", r"\xe2\x80", r"\n", "a", "<|reserved_special_token_7|> (unused)",
        "<|end|> (special)", "no token (unused)",
    ]  # fmt: skip


def test_every_piece_of_a_byte_level_vocabulary_has_the_text_that_the_tokenizer_decodes():
    made = byte_level()
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    ids = [id for id in range(len(made)) if id not in made.all_special_ids]
    for id, name in zip(ids, token_names(made, ids), strict=True):
        decoded = made.decode([id], clean_up_tokenization_spaces=False)
        assert name.kind is None
        if "\ufffd" not in decoded:  # bytes that are no whole character
            assert name.text == decoded


def test_special_and_unused_tokens_are_marked():
    made = wordpiece()
    found = names_of(made, "[PAD]", "[unused0]", "the", "##ting")
    assert found == [("[PAD]", "special"), ("[unused0]", "unused"), ("the", None), ("##ting", None)]
    assert [str(name) for name in found] == ["[PAD] (special)", "[unused0] (unused)", "the", "##ting"]


@pytest.mark.parametrize(
    ("piece", "kind"),
    [("<unused12>", "unused"), ("madeupword0003", "unused"), ("unused", None), ("reserved", None)],
)
def test_words_of_a_text_are_not_unused(piece, kind):
    made = wordpiece(words=["the", piece])
    assert names_of(made, piece) == [(piece, kind)]


def test_the_mark_of_sentencepiece_is_a_space():
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("s", -2.0)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    made = T.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert names_of(made, "▁the", "s") == [(" the", None), ("s", None)]
