"""Row tables of every kind: files, checks, bytes, pieces and the order of rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from embkern.tables import ROW_TABLES, ProductTable, PrunedTable, ScalarTable, TensorTrainTable
from embkern.tables.bit_codes import codes_of_rows, pack_codes, packed_bytes, rows_taken
from embkern.tables.resizing import resized
from tests.row_tables import NAMES, row_table

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per_row", [1, 7, 32])
def test_codes_are_a_stream_of_bits(bits, per_row):
    codes = torch.randint(2**bits, (37, per_row), dtype=torch.uint8)
    stream = pack_codes(codes, bits)
    assert len(stream) == packed_bytes(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    text = "".join(f"{int(byte):08b}"[::-1] for byte in stream)
    values = [int(text[bits * i : bits * (i + 1)][::-1], 2) for i in range(codes.numel())]
    assert values == codes.flatten().tolist()
    ids = torch.tensor([36, 0, 5, 5])
    assert torch.equal(codes_of_rows(stream, ids, per_row, bits), codes[ids].int())
    assert torch.equal(rows_taken(stream, ids, per_row, bits), pack_codes(codes[ids], bits))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_table_and_equal_tables_have_equal_files(tmp_path, name):
    table = row_table(name)
    table.save(tmp_path / "a")
    loaded = type(table).load(tmp_path / "a")
    assert loaded.settings() == table.settings()
    assert loaded.tensors().keys() == table.tensors().keys()
    assert all(torch.equal(each, table.tensors()[name]) for name, each in loaded.tensors().items())
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata()["format"] == f"embkern.{table.kind}/1"
        assert json.loads(file.metadata()["num_embeddings"]) == 13
    assert table.nbytes == sum(each.nbytes for each in table.tensors().values())
    assert (tmp_path / "a").stat().st_size - table.nbytes < 2000
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        type(table).load(tmp_path / "b")


def test_every_kind_has_a_name_of_its_own_and_names_of_codes_are_of_codes_alone():
    assert len({each.kind for each in ROW_TABLES}) == len(ROW_TABLES)
    codes = {name for each in ROW_TABLES for name in each.code_dtypes}
    floats = {name for each in ROW_TABLES for name in each.tensor_names() if name not in each.code_dtypes}
    assert not codes & (floats | {"codes", "basis", "offset"})
    assert not any(name == "bias" or "decoder" in name for name in codes | floats)


@pytest.mark.parametrize("kind", [each.kind for each in ROW_TABLES])
def test_files_of_the_first_version_are_read(kind):
    table = next(each for each in ROW_TABLES if each.kind == kind).load(DATA / f"{kind}-1.safetensors")
    expected = torch.load(DATA / "row-tables-1.pt", weights_only=True)[kind]
    assert_close(table.to(torch.float32).to_dense(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_rows_and_order_is_taken(name, monkeypatch):
    table = row_table(name)
    dense = table.to_dense()
    assert_close(table.row_range(2, 9), dense[2:9])
    monkeypatch.setattr("embkern.tables.rows.PIECE_VALUES", 24)
    assert list(table.pieces()) == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]
    assert_close(table.to_dense(), dense)
    first = table.take(torch.arange(5))
    first.validate()
    assert_close(first.to_dense(), dense[:5])
    assert first.nbytes <= table.nbytes
    if name.startswith("pruned") and "nearest" not in name:
        with pytest.raises(ValueError, match="ids: expected some that are kept, got none among 2"):
            table.take(torch.tensor([1, 2]))
    ids = torch.tensor([12, 0, 4, 4, 7])
    if isinstance(table, TensorTrainTable):
        with pytest.raises(ValueError, match="num_embeddings: a tensor train cannot hold new rows"):
            table.take(ids)
        return
    other = table.take(ids)
    other.validate()
    assert_close(other.to_dense(), dense[ids])
    longer = resized(table, 15)
    longer.validate()
    assert longer.settings()["num_embeddings"] == 15
    assert_close(longer.to_dense()[:13], dense)
    assert_close(longer.to_dense()[13], longer.to_dense()[14])


@pytest.mark.parametrize("name", NAMES)
def test_casts_keep_codes_and_meta_tables_are_checked_by_shape(name):
    table = row_table(name).to(torch.float16)
    assert {each.dtype for n, each in table.tensors().items() if n not in table.code_dtypes} == {
        torch.float16
    }
    assert table.dtype == table.decode(torch.tensor([0])).dtype == torch.float16
    meta = table.to("meta")
    meta.validate()
    assert meta.nbytes == table.nbytes
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype, got torch.int32"):
        table.to(torch.int32)
    with pytest.raises(TypeError, match="ids: expected dtype torch.int32 or torch.int64, got torch.float32"):
        table.decode(torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("scalar", {"bits": 9}, "bits: expected an integer, 1 to 8, got 9"),
        ("scalar", {"bits": True}, "bits: expected an integer, 1 to 8, got True"),
        ("scalar", {"group": 0}, "group: expected an integer, 1 to 2147483647, got 0"),
        ("scalar", {"num_embeddings": 14}, r"packed_codes: expected shape \(70,\), got \(65,\)"),
        ("scalar", {"minima": torch.zeros(13, 2)}, r"minima: expected shape \(13, 1\)"),
        ("scalar", {"points": torch.zeros(8)}, r"points: expected shape \(32,\), got \(8,\)"),
        ("scalar", {"scales": torch.zeros(13, 1).int()}, "scales: expected a floating-point dtype"),
        ("scalar", {"minima": torch.zeros(13, 1).half()}, "minima: expected .* got torch.float16"),
        ("scalar", {"packed_codes": torch.zeros(65)}, "packed_codes: expected torch.uint8"),
        ("product", {"subspaces": 9}, "subspaces: expected an integer, 1 to 8, got 9"),
        ("product", {"codebooks": torch.zeros(9, 8)}, "codebooks: expected shape .K, 8. with K of 1"),
        ("product", {"codebooks": torch.zeros(2, 8)}, "packed_codes: expected codes below K = 2"),
        ("product", {"rotation": torch.zeros(8)}, r"rotation: expected shape \(8, 8\), got \(8,\)"),
        ("tensor train", {"rows": [2, 2]}, r"rows: expected a factor for each of 3 cores, got \[2, 2\]"),
        ("tensor train", {"rows": [2, 0, 4]}, "rows: expected an integer, 1 to 2147483647, got 0"),
        ("tensor train", {"columns": [2, 2, 3]}, "rows, columns: expected products of at least 13"),
        ("tensor train", {"core_3": torch.zeros(3, 8)}, "core_2: expected shape"),
        ("two cores", {"core_1": torch.zeros(8, 2)}, "core_1, core_3: expected one rank"),
        ("nonlinear", {"norms": torch.zeros(12)}, r"norms: expected shape \(13,\), got \(12,\)"),
        ("nonlinear", {"layer_2": torch.zeros(8, 3)}, r"layer_2: expected shape \(8, 4\)"),
        ("pruned, mean", {"unknown": "zero"}, "unknown: expected one of mean, nearest, error, got 'zero'"),
        ("pruned, mean", {"unknown": "error"}, r"kept_rows: expected shape \(5, 8\), got \(6, 8\)"),
        ("pruned, error", {"unknown": "nearest"}, "nearest_kept: expected with unknown='nearest' only"),
        (
            "pruned, mean",
            {"kept_ids": torch.tensor([0, 3, 3, 7, 9]).int()},
            "kept_ids: expected ascending ids below 13",
        ),
        (
            "pruned, nearest",
            {"nearest_kept": torch.full((8,), 5).int()},
            "nearest_kept: expected 0 to 4, got 5 to 5",
        ),
        ("pruned packed, mean", {"scales": torch.ones(6)}, r"scales: expected shape \(5,\), got \(6,\)"),
        ("pruned packed, mean", {"mean_row": None}, "mean_row: expected with unknown='mean' only"),
        ("pruned packed, mean", {"mean_row": torch.ones(7)}, r"mean_row: expected shape \(8,\), got \(7,\)"),
        ("pruned packed, mean", {"records": torch.zeros(1).int()}, "records: expected .* words, got 1"),
        (
            "pruned packed, nearest",
            {"unknown": "error"},
            "nearest_kept: expected with unknown='nearest' only",
        ),
    ],
)
def test_contradictions_are_named(name, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(row_table(name), **changes)


def test_tables_by_hand():
    codes = pack_codes(torch.tensor([[0, 1, 2, 3, 3]]), 2)
    minima, points = torch.tensor([[10.0, 20.0]]), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    table = ScalarTable(
        torch.tensor([[2.0, 0.5]]), codes, minima, points, bits=2, group=3, num_embeddings=1, embedding_dim=5
    )
    assert table.decode(torch.tensor([0])).tolist() == [[8.0, 10.0, 12.0, 21.0, 21.0]]
    books = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    table = ProductTable(
        books, pack_codes(torch.tensor([[0, 1], [1, 0]]), 1), torch.tensor([1.0, 10.0]),
        bits=1, subspaces=2, num_embeddings=2, embedding_dim=3,
    )  # fmt: skip
    assert table.spans() == [(0, 1), (1, 3)]
    assert table.to_dense().tolist() == [[1, 5, 6], [40, 20, 30]]
    rows, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 3]).int()
    nearest = torch.tensor([0, 1, 0]).int()
    table = PrunedTable(rows, ids, nearest, "nearest", num_embeddings=5, embedding_dim=1)
    assert table.to_dense().flatten().tolist() == [1, 1, 2, 2, 1]
