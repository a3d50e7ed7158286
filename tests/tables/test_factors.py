"""Factors: sizes, decoding, round trips through files, and refusal of invalid files."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from embkern import Factors


@pytest.fixture
def factors() -> Factors:
    return Factors(torch.randn(11, 3), torch.randn(3, 5), torch.randn(5))


def test_sizes(factors):
    assert (factors.num_embeddings, factors.rank, factors.embedding_dim) == (11, 3, 5)
    assert factors.nbytes == (11 * 3 + 3 * 5 + 5) * 4
    assert factors.to(dtype=torch.float64).dtype == torch.float64
    assert factors.to(torch.bfloat16).nbytes == (11 * 3 + 3 * 5 + 5) * 2
    assert Factors(factors.codes, factors.basis).nbytes == (11 * 3 + 3 * 5) * 4


def test_a_cast_to_integers_is_refused(factors):
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype, got torch.int64"):
        factors.to(torch.int64)


@pytest.mark.parametrize("activation", [None, "elu"])
def test_decoding(factors, activation):
    factors = Factors(factors.codes, factors.basis, factors.offset, activation)
    dense = factors.codes @ factors.basis + factors.offset
    if activation:
        dense = torch.nn.functional.elu(dense)
    assert_close(factors.to_dense(), dense)
    assert_close(factors.decode(torch.tensor([[3], [7]])), dense[[3, 7]].unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("with_offset", [True, False])
def test_round_trip(tmp_path, factors, dtype, activation, with_offset):
    offset = factors.offset if with_offset else None
    saved = Factors(factors.codes, factors.basis, offset, activation).to(dtype)
    saved.save(tmp_path / "f.safetensors")
    loaded = Factors.load(tmp_path / "f.safetensors")
    assert loaded.activation == activation
    assert loaded.tensors().keys() == saved.tensors().keys()
    assert all(torch.equal(loaded.tensors()[name], tensor) for name, tensor in saved.tensors().items())
    assert os.listdir(tmp_path) == ["f.safetensors"], "no temporary file stays"


def test_views_and_non_contiguous_tensors_are_saved(tmp_path):
    big = torch.randn(20, 6)
    Factors(big[::2, :3], torch.randn(5, 3).t()).save(tmp_path / "f")
    assert torch.equal(Factors.load(tmp_path / "f").codes, big[::2, :3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(4, 3), torch.zeros(2, 5)),
            ValueError,
            r"\(V, r\) and \(r, H\), got \(4, 3\) and \(2, 5\)",
        ),
        ((torch.zeros(4), torch.zeros(4, 5)), ValueError, "codes, basis"),
        (
            (torch.zeros(4, 3), torch.zeros(3, 5), torch.zeros(3)),
            ValueError,
            r"offset: expected shape \(5,\)",
        ),
        ((torch.zeros(4, 3), torch.zeros(3, 5).half()), TypeError, "basis: expected a floating-point dtype"),
        ((torch.zeros(4, 3).int(), torch.zeros(3, 5).int()), TypeError, "codes: expected a floating-point"),
        ((torch.zeros(4, 3), torch.zeros(3, 5), None, "relu"), ValueError, "activation: expected one of"),
    ],
)
def test_bad_factors_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Factors(*arguments)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a file of factors, found none"):
        Factors.load(tmp_path / "none")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, factors):
    path = tmp_path / "f"
    factors.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Factors.load(path)


def test_an_edited_value_is_noticed(tmp_path, factors):
    path = tmp_path / "f"
    factors.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        Factors.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "expected format 'embkern.factors/1', got None"),
        (lambda t, m: m.update(format="embkern.factors/9"), "got 'embkern.factors/9'"),
        (lambda t, m: m.pop("checksums"), "metadata is damaged"),
        (lambda t, m: m.update(checksums='["codes", "basis", "offset"]'), "metadata is damaged"),
        (lambda t, m: m.update(activation="[1"), "metadata is damaged"),
        (lambda t, m: m.update(activation='"relu"'), "activation: expected one of"),
        (lambda t, m: t.pop("basis"), "expected codes, basis and optionally offset, got"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "expected codes, basis"),
        (lambda t, m: t.update(codes=torch.zeros(11, 3)), "codes was changed"),
    ],
)
def test_edited_files_are_refused(tmp_path, factors, change, message):
    from safetensors import safe_open

    path = tmp_path / "f"
    factors.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        Factors.load(path)
