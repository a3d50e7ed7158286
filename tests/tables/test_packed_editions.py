"""Files of both editions of the packed format, and tables of the first one, which torch alone serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from embkern import PackedEmbedding
from embkern.ops import gather_decode, packed_cross_entropy, packed_logits
from embkern.tables.packed import PackedTable
from embkern.tables.resizing import resized
from tests.packed_decoder import decode_row

DATA = Path(__file__).parent.parent / "data"
FIRST = ["packed-1", "packed-1-basis"]


def load(name: str) -> PackedTable:
    return PackedTable.load(DATA / f"{name}.safetensors")


@pytest.mark.parametrize("name", [*FIRST, "packed-2", "packed-2-basis"])
def test_rows_are_those_that_the_page_defines(name):
    table = load(name).to(torch.float32)
    tensors = {key: each.tolist() for key, each in table.tensors().items()}
    V, H = table.num_embeddings, table.embedding_dim
    expected = torch.tensor([decode_row(i, tensors, V, H) for i in range(V)], dtype=torch.float64)
    # Sums of up to 96 terms in fp32.
    assert_close(table.to_dense().double(), expected, rtol=0, atol=96 * 2**-23 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FIRST)
def test_a_table_of_the_first_edition_is_saved_as_such(tmp_path, name):
    load(name).save(tmp_path / "again")
    with safe_open(tmp_path / "again", "pt") as file:
        assert file.metadata()["format"] == "embkern.packed/1"
    assert torch.equal(PackedTable.load(tmp_path / "again").to_dense(), load(name).to_dense())


def test_lookup_head_and_loss_of_the_first_edition_are_those_of_torch():
    table = load("packed-1-basis").to(torch.float32)
    packed, H = table.packed_tensors(), table.embedding_dim
    ids, hidden = torch.tensor([3, 36, 3]), torch.randn(4, H)
    rows, labels = table.to_dense(), torch.tensor([0, 36, 5, 1])
    assert torch.equal(gather_decode(ids, *packed, embedding_dim=H), rows[ids])
    assert_close(packed_logits(hidden, *packed), hidden @ rows.t())
    loss = torch.nn.functional.cross_entropy(hidden @ rows.t(), labels)
    assert_close(packed_cross_entropy(hidden, labels, *packed), loss)
    calls = {
        "gather_decode": lambda backend: gather_decode(ids, *packed, embedding_dim=H, backend=backend),
        "packed_logits": lambda backend: packed_logits(hidden, *packed, backend=backend),
        "packed_cross_entropy": lambda backend: packed_cross_entropy(
            hidden, labels, *packed, backend=backend
        ),
    }
    for name, call in calls.items():
        for backend in ("native", "triton"):
            message = f"'{backend}' cannot serve {name} of tables of the first edition"
            with pytest.raises(RuntimeError, match=message):
                call(backend)


def test_a_module_trains_and_keeps_a_table_of_the_first_edition():
    table = load("packed-1-basis")
    embedding = PackedEmbedding(table)
    assert embedding.levels.dtype == torch.int32, "which gloo and NCCL send"
    assert torch.equal(embedding.table.levels, table.levels)
    state = embedding.state_dict()
    assert state["levels"].dtype == torch.int32
    for dtype in (torch.int16, torch.int32):
        other = PackedEmbedding(load("packed-1-basis"))
        other.load_state_dict({**state, "levels": state["levels"].to(dtype)}, assign=True)
        assert other.levels.dtype == torch.int32
        assert torch.equal(other(torch.arange(37)), table.to_dense())
    embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.scales.grad.any()


def test_a_table_of_the_first_edition_gets_no_new_rows():
    table = load("packed-1")
    assert resized(table, 20).num_embeddings == 20
    with pytest.raises(
        ValueError, match="num_embeddings: expected at most 70, got 71; a packed table of the"
    ):
        resized(table, 71)
