"""Sentence embeddings, their pooling, and the comparison of two models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from embkern.fidelity import embed_sentences, read_sentences, sentence_fidelity
from embkern.fidelity.sentences import pooling_of
from tests.example_models import tiny_bert, word_tokenizer

SENTENCES = ["red green", "blue", "green red blue red green blue", "blue blue green"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_do_not_depend_on_the_batch(pooling):
    model, tokenizer = tiny_bert().train(), word_tokenizer()
    whole = embed_sentences(model, tokenizer, SENTENCES, pooling=pooling)
    single = torch.cat([embed_sentences(model, tokenizer, [each], pooling=pooling) for each in SENTENCES])
    torch.testing.assert_close(whole, single)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    assert model.training, "the mode is restored"


def test_mean_pooling_ignores_padding():
    model, tokenizer = tiny_bert().eval(), word_tokenizer()
    batch = tokenizer(["blue green"], return_tensors="pt")
    expected = F.normalize(model(**batch).last_hidden_state.mean(1), dim=1)
    got = embed_sentences(model, tokenizer, ["blue green", "red " * 9])[:1]
    torch.testing.assert_close(got, expected)


def test_fidelity_is_one_for_equal_and_less_for_other_embeddings():
    before = F.normalize(torch.randn(30, 8), dim=1)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    same, rotated = sentence_fidelity(before, before), sentence_fidelity(before, before @ rotation)
    assert same.mean_cosine == pytest.approx(1)
    assert same.spearman == pytest.approx(1)
    assert rotated.mean_cosine < 0.8
    assert rotated.spearman == pytest.approx(1, abs=1e-4), "a rotation does not change similarities"
    other = sentence_fidelity(before, F.normalize(torch.randn(30, 8), dim=1))
    assert abs(other.spearman) < 0.5
    assert sentence_fidelity(before[:2], before[:2]).spearman is None


def test_a_foreign_tokenizer_is_named():
    with pytest.raises(ValueError, match="tokenizer: has ids beyond the model's vocabulary"):
        embed_sentences(tiny_bert(vocab_size=5), word_tokenizer(), ["blue green"])


def test_reading_sentences(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n one \n\ntwo\nthree\n", encoding="utf-8")
    assert read_sentences(path) == ["one", "two", "three"]
    assert read_sentences(path, limit=2) == ["one", "two"]
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="text: expected sentences, one a line, got an empty file"):
        read_sentences(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="text: .* is not UTF-8 text"):
        read_sentences(path)
    with pytest.raises(FileNotFoundError, match="text: expected a text file, found none"):
        read_sentences(tmp_path / "none")


def test_pooling_follows_the_models_own_file(tmp_path):
    assert pooling_of(None) == pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_of(tmp_path) == "cls"
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls", "include_prompt": true}')
    assert pooling_of(tmp_path) == "cls"
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match="pooling: expected mean or cls .* got 'max_tokens'"):
        pooling_of(tmp_path)
    for content in ("{", "[" * 10**5, "[]", "3"):
        (tmp_path / "1_Pooling" / "config.json").write_text(content)
        with pytest.raises(ValueError, match="pooling: .*config.json is damaged"):
            pooling_of(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": [1]}')
    with pytest.raises(ValueError, match=r"pooling: expected mean or cls .* got \[1\]"):
        pooling_of(tmp_path)
