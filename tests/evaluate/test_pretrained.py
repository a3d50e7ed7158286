"""What cells share: hashes of the files they depend on, and models that cannot be fine-tuned."""

from __future__ import annotations

import pytest

for _needed in ("transformers", "datasets", "accelerate", "sklearn", "scipy"):
    pytest.importorskip(_needed)
import transformers as T

import embkern
from embkern.evaluate import GLUE, SQUAD
from embkern.evaluate.pretrained import Pretrained
from tests.evaluate.tiny_tasks import study

pytestmark = pytest.mark.usefixtures("fine_tuning")


def test_digests_change_with_the_files(bert, data, tmp_path):
    source = Pretrained(str(bert), data, None, None)
    assert Pretrained(str(bert), data, None, None).model_digest == source.model_digest
    assert source.data_digest(GLUE["sst2"]) != source.data_digest(SQUAD)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bert.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert Pretrained(str(copy), data, None, None).model_digest == source.model_digest
    (copy / "config.json").write_text("{}")
    assert Pretrained(str(copy), data, None, None).model_digest != source.model_digest
    assert Pretrained("of/hub", data, None, None).model_digest != source.model_digest
    text = tmp_path / "text.txt"
    text.write_text("good bad")
    assert Pretrained(str(bert), data, None, text).counts_digest("allocate") != source.counts_digest(
        "allocate"
    )


def test_unusable_models_are_refused(bert, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="'no/model' is neither a local directory nor on the hub"):
        study("no/model", data, tmp_path)
    tokenizer = T.AutoTokenizer.from_pretrained(bert)
    roberta = tmp_path / "roberta"  # its positions start after the padding token's
    config = T.RobertaConfig(vocab_size=105, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=34, pad_token_id=0)  # fmt: skip
    T.RobertaModel(config).save_pretrained(roberta)
    tokenizer.save_pretrained(roberta)
    with pytest.raises(ValueError, match="max_length: expected at most the model's 33, got 34"):
        study(roberta, data, tmp_path, max_length=34)
    small = tmp_path / "small"
    embkern.compress(bert, ratio=2, output=small)
    with pytest.raises(ValueError, match="the model's embedding is compressed already"):
        study(small, data, tmp_path / "out")
