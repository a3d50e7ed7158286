"""The benchmark of a masked model's own samples: the rows."""

import json

import pytest
import torch

T = pytest.importorskip("transformers")
from benchmarks import masked_samples

pytestmark = pytest.mark.slow

WORDS = [f"word{number}" for number in range(59)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a random masked model of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    config = T.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    T.BertForMaskedLM(config).save_pretrained(directory)
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    T.PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="[MASK]", **specials).save_pretrained(
        directory
    )
    return directory


def test_rows_have_perplexity_and_divergence_at_equal_bytes(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[(7 * n + k) % 59] for k in range(12)) for n in range(60)))
    places = ["--model", str(tiny), "--text", str(text), "--scored", str(text), "--results", str(tmp_path)]
    masked_samples.main([*places, "--rounds", "2", "--ratios", "6"])
    contents = json.loads((tmp_path / "masked_samples.json").read_text())
    known = [row["known"] for row in contents["rows"]]
    assert known == [
        f"{name}, 6x"
        for name in (
            "nothing",
            "own samples, 2 rounds",
            "counts",
            "counts, own samples, 2 rounds",
            "counts, text",
        )
    ]
    for row in contents["rows"]:
        assert row["bytes"] <= 64 * 64 * 4 / 6
        assert row["tied"]["kl"] > 0
        assert row["input_only"]["perplexity"] > 1
