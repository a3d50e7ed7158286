"""The config of a saved model: refusal of edited and damaged ones, equal bytes, and the first version."""

from __future__ import annotations

import json
import random

import pytest
import torch

T = pytest.importorskip("transformers")

from embkern.models.loading import load_model
from tests.example_models import H, V, build, outputs
from tests.models.compressing import compressed, edit, of_table, shape

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["table"]["shapes"].update(codes=[V, 6], basis=[6, H]),
            "does not hold the compressed table its config describes",
        ),
        (shape("codes", V, 0), "shapes: expected positive integers, got .101, 0. of codes"),
        (shape("codes", V, "7"), "shapes: expected positive integers, got .101, '7'. of codes"),
        (shape("codes", V, True), "shapes: expected positive integers, got .101, True. of codes"),
        (shape("codes", V, 9), r"codes, basis: expected shapes .V, r. and .r, H., got .101, 9. and .7, 32."),
        (shape("codes", 100, 7), "describes 100 x 32, the model's config says 101 x 32"),
        (shape("surprise", 3), "quantization_config.table is damaged: .*surprise"),
        (of_table(shapes=3), "quantization_config.table is damaged"),
        (lambda c: c["table"]["shapes"].pop("offset"), "checksums: expected those of basis, codes, got"),
        (of_table(kind="folded"), "kind: expected one of factors, packed, .*, got 'folded'"),
        (of_table(settings={"depth": 3}), "quantization_config.table is damaged: .*depth"),
        (lambda c: c["table"].pop("dtype"), "quantization_config.table is damaged"),
        (of_table(dtype="float31"), "dtype: expected a floating-point torch dtype .*, got 'float31'"),
        (of_table(settings={"activation": "relu"}), "activation"),
        (of_table(head="half"), "head: expected factorized, dense or null"),
        (of_table(scales={"x": "a"}), "scales: expected finite numbers"),
        (of_table(checksums={"codes": "crc32:0"}), "codes was changed after it was saved"),
        (of_table(scales={"x": float("nan")}), "scales: expected finite numbers"),
        (of_table(dtype="int64"), "dtype: expected a floating-point torch dtype"),
        (of_table(checksums={"decoder": "x"}), "checksums: expected those of basis, codes, offset"),
        (of_table(checksums={"codes": ["crc32:0"]}), "checksums: expected those of basis, codes, offset"),
        (of_table(checksums=None), "quantization_config.table is damaged"),
        (lambda c: c.pop("table"), "quantization_config.table: expected what embkern saved"),
        (lambda c: c.update(surprise=1), "unknown field.s. surprise"),
        (lambda c: c.update(format_version=5), "format_version: expected 1 or 2 or 3 or 4, got 5"),
        (
            lambda c: c.update(format_version=2),
            "quantization_config was changed after it was saved .expected None",
        ),
        (lambda c: c.update(method="magic"), "method: .* got 'magic'"),
    ],
)
def test_an_edited_config_is_refused(saved, change, message):
    edit(saved / "config.json", change)
    with pytest.raises(ValueError, match=message):
        T.BertModel.from_pretrained(saved)


def test_a_changed_value_of_a_saved_config_is_noticed(saved):
    path = saved / "config.json"
    whole = path.read_text()
    for old, new in (
        ('"embeddings.word_embeddings": 1.0', '"embeddings.word_embeddings": 3.0'),
        ('"lm_head": "factorized"', '"lm_head": "dense"'),
        ('"rank": 7', '"rank": 6'),
        ('"checksum": "crc32:', '"checksum": "crc32:0'),
        ('"checksum"', '"checksun"'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        for load in (T.BertModel.from_pretrained, load_model):
            with pytest.raises(ValueError, match="quantization_config was changed|unknown field.s. checksun"):
                load(saved)
    path.write_text(whole)
    load_model(saved)


def test_a_flipped_bit_of_a_description_is_noticed(saved):
    path, draw = saved / "config.json", random.Random(0)
    whole = path.read_bytes()
    start = whole.index(b'"quantization_config"')
    stop = whole.index(b'"shapes"', start)
    for at in draw.sample(range(start, stop), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model: .* cannot be loaded: "):
            load_model(saved)


@pytest.mark.parametrize(
    "value", [[[[]]], "[" * 10**5 + "]" * 10**5, 2**62, None, {"a": {}}], ids=lambda v: str(v)[:9]
)
def test_what_transformers_cannot_print_is_refused_by_name(saved, value):
    path = saved / "config.json"
    edit(path, of_table(dtype="here"))
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(path.read_text().replace('"here"', text))
    with pytest.raises(ValueError, match=f"{path}.*(dtype: expected|nested too deep)"):
        load_model(saved)


def test_what_is_saved_twice_has_the_same_bytes(tmp_path, kind):
    model = compressed(build("bert"), kind)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    loaded = T.BertForMaskedLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    for name in names:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes()
        assert first == (tmp_path / "again" / name).read_bytes()


def test_models_of_the_first_version_load(saved):
    expected = outputs(T.BertModel.from_pretrained(saved))

    def downgrade(config):
        table = config["table"]
        shapes = table.pop("shapes")
        codes, basis = shapes["codes"], shapes["basis"]
        first = dict(num_embeddings=codes[0], embedding_dim=basis[1], rank=codes[1], offset=True)
        config["table"] = {**first, **table.pop("settings"), **table}
        assert config["table"].pop("kind") == "factors"

    edit(saved / "config.json", downgrade)
    assert torch.equal(outputs(T.BertModel.from_pretrained(saved)), expected)
