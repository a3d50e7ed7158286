"""The benchmark of whole models: the fields it writes, and that a model with wrong logits is not timed."""

import json

import pytest

T = pytest.importorskip("transformers")
from benchmarks import generate

pytestmark = pytest.mark.slow

QUICK = ["--device", "cpu", "--threads", "1", "--cell-seconds", "0", "--models", "smollm2", "--random"]
QUICK += ["--ratio", "6", "--providers", "dense-fp32", "dense-bf16", "embkern"]


@pytest.fixture
def tiny(monkeypatch):
    def of_shape(name):
        config = T.LlamaConfig(
            vocab_size=301, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        return T.LlamaForCausalLM(config)

    monkeypatch.setattr(generate, "_of_shape", of_shape)
    monkeypatch.setattr(generate, "PREFILL", 40)
    monkeypatch.setattr(generate, "NEW", 3)


def test_a_run_writes_speed_and_memory_of_every_model(tmp_path, tiny):
    generate.main([*QUICK, "--cache", str(tmp_path / "cache"), "--results", str(tmp_path)])
    contents = json.loads((tmp_path / "generate_cpu.json").read_text())
    assert contents["failures"] == []
    assert contents["smollm2"] == "random weights in its shape"
    assert contents["smollm2_error"] < 1e-4
    cells = [(row["op"], row["provider"]) for row in contents["rows"]]
    providers = ("dense-fp32", "dense-bf16", "embkern")
    assert sorted(cells) == sorted((op, name) for op in ("prefill", "decode", "memory") for name in providers)
    for row in contents["rows"]:
        if row["op"] == "memory":
            # So small a model is lost in what the system reclaims of mapped libraries meanwhile.
            assert abs(row["resident"]) < row["before"]
        else:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
            assert row["per_second"] == pytest.approx(row["count"] / row["p50"] * 1e6, rel=1e-2)
            assert row["times_as_fast_as"].keys() == {*providers} - {row["provider"]}


def test_wrong_logits_are_not_timed(tmp_path, tiny, monkeypatch):
    right = generate.Generate._forward
    calls = []

    def wrong(model):
        calls.append(model)
        return right(model) * (1 + 0.001 * len(calls))

    monkeypatch.setattr(generate.Generate, "_forward", staticmethod(wrong))
    with pytest.raises(SystemExit, match="1"):
        generate.main(
            [*QUICK, "--clock", "process", "--cache", str(tmp_path / "cache"), "--results", str(tmp_path)]
        )
    contents = json.loads((tmp_path / "generate_cpu.json").read_text())
    assert contents["clock"] == "process"
    assert "embkern" not in {row["provider"] for row in contents["rows"]}
    assert "relative error" in contents["failures"][0]["error"]
