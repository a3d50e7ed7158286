"""Compressed models as ONNX files: onnxruntime computes what torch does, and the table stays compressed.

The models have one layer: an export takes seconds for each, and the table is what is tested.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

T = pytest.importorskip("transformers")
pytest.importorskip("onnxscript", reason="needs embkern[interop]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs embkern[interop]")

import embkern
from embkern import FactorizedEmbedding, PackedEmbedding
from embkern.export.block_quantized import BlockTable, block_table
from embkern.export.onnx import _smaller
from embkern.tables.kept_rows import KeptRowsTable
from tests.example_models import MODELS, V, build
from tests.example_tables import packed_of
from tests.models.compressing import compressed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quantizing")]


def run(path: Any, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
    return torch.from_numpy(output)


def inputs_of(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if length > 3:
        inputs["attention_mask"][-1, -2:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, V, (batch, 4))
    return inputs


CASES = [*((name, "packed") for name in MODELS), *((name, "factors") for name in ("bert", "t5", "gemma3"))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_onnxruntime_computes_the_same(tmp_path, name, kind):
    model = compressed(build(name, layers=1), kind)
    model.save_pretrained(tmp_path / "small")
    embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx")
    for batch, length in ((3, 12), (1, 5), (2, 1)):
        inputs = inputs_of(model, batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        expected = expected.logits if "logits" in expected else expected.last_hidden_state
        assert_close(run(tmp_path / "model.onnx", inputs), expected, rtol=1e-3, atol=1e-5)


def pruned(name: str, unseen: str, **recipe: Any) -> Any:
    """A model whose table stores every third row, quantised by ``allocate`` or, with ``prune``, as it is."""
    model = build(name, layers=1)
    counts = torch.zeros(V).index_fill(0, torch.arange(0, V, 3), 1.0)
    if recipe:
        embkern.compress(model, counts=counts, unknown=unseen, **recipe)
    else:
        embkern.compress(model, ratio=4, counts=counts, unseen=unseen, calibrate=False)
    return model


@pytest.mark.parametrize(
    ("name", "unseen", "recipe"),
    [
        ("gpt2", "mean", {}),
        ("t5", "nearest", {}),
        ("bert", "mean", {"method": "prune"}),
        ("llama-untied", "nearest", {"method": "prune"}),
    ],
)
def test_tables_that_leave_rows_out(tmp_path, name, unseen, recipe):
    model = pruned(name, unseen, **recipe)
    assert isinstance(model.get_input_embeddings().table, KeptRowsTable)
    model.save_pretrained(tmp_path / "small")
    embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx")
    for batch, length in ((3, 12), (1, 5)):
        inputs = inputs_of(model, batch, length)
        with torch.no_grad():
            expected = model(**inputs).logits
        assert_close(run(tmp_path / "model.onnx", inputs), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_table_that_refuses_tokens_is_refused(tmp_path, bits):
    pruned("bert", "error", method="prune").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="got one that refuses those it does not store"):
        embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx", bits=bits)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("size", [1, 2, 31, 64, 1000])
def test_a_binary_search_is_searchsorted(size):
    ascending = torch.randint(0, 2000, (size,)).unique().int()
    values = torch.cat([torch.tensor([-1, 0, 3000]), torch.randint(0, 2000, (57,))]).int().view(3, 20)
    assert torch.equal(_smaller(ascending, values), torch.searchsorted(ascending, values))


class Lookup(nn.Module):
    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding, self.head = embedding, embedding.head()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


@pytest.mark.parametrize("offset", [False, True])
def test_every_kind_of_row_through_the_exporter_of_torch(tmp_path, kind, offset):
    """A table of 2000 rows: the file has the table once, and nothing that grows with it."""
    torch.manual_seed(0)
    if kind == "packed":
        embedding: Any = PackedEmbedding(packed_of(torch.randn(2000, 80), torch.float32, offset), scale=3.0)
    else:
        embedding = FactorizedEmbedding(2000, 80, 16, offset=offset, scale=3.0)
    module, ids = Lookup(embedding).eval(), torch.randint(0, 2000, (2, 9))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        module, (ids,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=(sizes,), optimize=False
    )  # fmt: skip
    for shape in ((3, 7), (1, 1)):
        ids = torch.randint(0, 2000, shape)
        expected = module(ids)
        scale = float(expected.detach().abs().max())
        name = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()[0].name
        assert_close(run(tmp_path / "m.onnx", {name: ids}), expected, rtol=1e-3, atol=1e-5 * scale)


def test_the_table_stays_compressed(tmp_path):
    """At 16 bits in a row's scale and 3.5 a value, of 20000 rows."""
    config = T.BertConfig(
        vocab_size=20_000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    dense = T.BertForMaskedLM(config)
    size = dense.get_input_embeddings().weight.nbytes
    rest = sum(parameter.nbytes for parameter in dense.parameters()) - size
    model = compressed(dense, "packed")
    table = model.get_input_embeddings().table.nbytes
    model.save_pretrained(tmp_path / "small")
    embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx")
    # Scales are of float32 here. Nodes take some hundred bytes each, whatever the size of the model.
    assert (tmp_path / "model.onnx").stat().st_size < rest + table + 2 * 20_000 + 400_000
    assert rest + table + 2 * 20_000 + 400_000 < rest + size / 2
    content = (tmp_path / "model.onnx").read_bytes()
    for folder in (tmp_path, Path(embkern.__file__).parent, Path(torch.__file__).parent):
        assert str(folder).encode() not in content


def decoded(table: BlockTable) -> Tensor:
    """The rows (V, H) of a table of blocks."""
    codes = table.codes
    if table.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
    rows = (codes.float() - 2 ** (table.bits - 1)) * table.scales.unsqueeze(2)
    return rows.flatten(1)[:, : table.width]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["bert", "gemma3", "albert", "t5", "llama-untied"])
def test_the_operators_of_onnxruntime_look_up_blocks(tmp_path, name, bits):
    """Ties, scales, rows of half a block. The model in torch is given the rows of the blocks."""
    model = compressed(build(name, layers=1), "packed")
    model.save_pretrained(tmp_path / "small")
    embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx", bits=bits)
    embedding = model.get_input_embeddings()
    rows = decoded(block_table(embedding, bits))
    # Half a step of the largest value of a block; the opposite of that value is a whole step off.
    largest = embedding.weight.detach().abs().amax(1, keepdim=True)
    assert bool(((rows - embedding.weight).abs() <= 1.001 * largest / 2 ** (bits - 1)).all())
    model.dequantize()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
        for batch, length in ((3, 12), (1, 1)):
            inputs = inputs_of(model, batch, length)
            expected = model(**inputs)
            expected = expected.logits if "logits" in expected else expected.last_hidden_state
            assert_close(run(tmp_path / "model.onnx", inputs), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_every_table_has_its_own_blocks(tmp_path, bits):
    """Positions, and a head that is not tied: each module looks up the rows of its own table."""
    config = T.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = T.GPT2LMHeadModel(config).eval()
    tables = ("transformer.wte", "transformer.wpe", "lm_head")
    embkern.compress(model, tables={name.rpartition(".")[2]: 2 for name in tables}, calibrate=False)
    model.save_pretrained(tmp_path / "small")
    embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx", bits=bits)
    rows = {name: model.get_submodule(name).weight.detach().clone() for name in tables}
    if bits is not None:
        rows = {name: decoded(block_table(model.get_submodule(name), bits)) for name in tables}
    model.dequantize()
    with torch.no_grad():
        for name, each in rows.items():
            model.get_submodule(name).weight.copy_(each)
        inputs = inputs_of(model, 2, 9)
        assert_close(run(tmp_path / "model.onnx", inputs), model(**inputs).logits, rtol=1e-3, atol=1e-5)


def test_the_command_and_its_errors(tmp_path):
    compressed(build("bert-backbone", layers=1)).save_pretrained(tmp_path / "small")
    command = [sys.executable, "-m", "embkern", "export", tmp_path / "small", "--format", "onnx"]
    command += ["-o", tmp_path / "model.onnx"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'small'} -> {tmp_path / 'model.onnx'} (onnx)\n"
    with pytest.raises(FileExistsError, match="output: .* exists"):
        embkern.export_onnx(tmp_path / "small", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="bits: expected one of 4, 8, got 3"):
        embkern.export_onnx(tmp_path / "small", tmp_path / "other.onnx", bits=3)
    build("bert-backbone", layers=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="model: expected one compressed by embkern, got a dense one"):
        embkern.export_onnx(tmp_path / "dense", tmp_path / "model.onnx", overwrite=True)
