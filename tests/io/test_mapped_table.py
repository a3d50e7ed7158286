"""Tables in a file give the rows and factors of tables in memory, bit for bit, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from embkern.io import mapped_table
from embkern.io.mapped_table import TableFile
from embkern.methods import autoencoder, base

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stored(path, table: torch.Tensor, **others: torch.Tensor) -> TableFile:
    save_file({"table": table, **others}, path)
    return TableFile(path, "table")


def write(path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (300, 64)], ids=str)
def test_rows_are_those_of_the_tensor(tmp_path, dtype, shape):
    table = torch.randn(shape).to(dtype)
    file = stored(tmp_path / "t.safetensors", table, another=torch.ones(3))
    assert (file.shape, file.dtype, len(file), file.nbytes) == (shape, dtype, shape[0], table.nbytes)
    assert torch.equal(file.read(), table)
    ids = torch.randint(shape[0], (50,))
    rows = file.gather(ids)
    assert rows.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(rows, table[ids].to(rows.dtype))
    for size in (1, 7, 1000):
        assert all(map(torch.equal, file.blocks(size), table.split(size)))
    part = file.section(shape[0] // 3, shape[0])
    assert torch.equal(part.read(), table[shape[0] // 3 :])
    assert torch.equal(part.gather(torch.tensor([0])), table[shape[0] // 3 :][:1].to(rows.dtype))


@pytest.mark.parametrize("bound", [1, 3 * 2**20], ids=["a row at a time", "a window at a time"])
def test_rows_do_not_depend_on_the_bound(tmp_path, monkeypatch, bound):
    table = torch.randn(3000, 512)  # 6 MB: three windows of 2 MB
    file = stored(tmp_path / "t.safetensors", table)
    monkeypatch.setattr(mapped_table, "RESIDENT_BYTES", bound)
    ids = torch.randperm(3000)[:999]
    assert torch.equal(file.gather(ids), table[ids])
    assert torch.equal(file.read(5, 2998), table[5:2998])


@pytest.mark.parametrize("padding", range(4))
def test_rows_need_no_alignment(tmp_path, padding):
    table = torch.randn(6, 3)
    header = {"t": {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, table.nbytes]}}
    write(tmp_path / "t", json.dumps(header).encode() + b" " * padding, table.numpy().tobytes())
    assert torch.equal(TableFile(tmp_path / "t", "t").gather(torch.tensor([5, 0])), table[[5, 0]])


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (dict(dtype="I64"), TypeError, "t: expected a dtype of F64, F32, F16, BF16 in .*, got I64"),
        (dict(shape=[24]), ValueError, r"t: expected shape \(V, H\) .*, got \(24,\)"),
        (dict(shape=[0, 4]), ValueError, r"got \(0, 4\)"),
        (dict(shape=[7, 4]), ValueError, "is truncated: t ends beyond"),
        (dict(shape=[1000, 4], data_offsets=[0, 16000]), ValueError, "is truncated"),
        (dict(shape=[-6, -4]), ValueError, "is not a readable safetensors file"),
        (dict(data_offsets=[0]), ValueError, "is not a readable safetensors file"),
        (dict(dtype=None), ValueError, "is not a readable safetensors file"),
        (dict(shape=[True, 24]), ValueError, "is not a readable safetensors file"),
        (dict(shape=[6.0, 4]), ValueError, "is not a readable safetensors file"),
        (dict(shape=[[6], 4]), ValueError, "is not a readable safetensors file"),
        (dict(shape=[2**62, 2**62]), ValueError, "is truncated"),
        (dict(shape=[2**64, 4]), ValueError, "is not a readable safetensors file"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(tmp_path, entry, error, message):
    header = {"t": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96], **entry}}
    write(tmp_path / "t", header, b"\0" * 96)
    with pytest.raises(error, match=message):
        TableFile(tmp_path / "t", "t")


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a safetensors file, found none at .*none"):
        TableFile(tmp_path / "none", "t")
    path = tmp_path / "t"
    for content in (b"", b"\1\2", b"not json", [1, 2], {"t": 3}, b"[" * 10**5, b"9" * 10**4):
        write(path, content)
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            TableFile(path, "t")
    write(path, b"{}", length=2**62)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        TableFile(path, "t")
    save_file({"one": torch.ones(2, 2), "two": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="name: expected one of one, two in .*, got 't'"):
        TableFile(path, "t")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(batch_size=16), dict(batch_size=200, init="svd"), dict(batch_size=10**6, rmse_weight=0.1)],
    ids=["small batches", "large batches, svd", "whole table"],
)
def test_the_factors_are_those_of_the_table_in_memory(tmp_path, monkeypatch, dtype, options):
    monkeypatch.setattr(base, "BLOCK_ROWS", 64)  # several blocks
    table = (torch.randn(300, 6) @ torch.randn(6, 10)).to(dtype)
    file = stored(tmp_path / "t.safetensors", table)
    run = dict(options, epochs=3, progress=False)
    expected = autoencoder(table, 4, **run, checkpoint=tmp_path / "memory.pt")
    factors = autoencoder(file, 4, **run)
    assert factors.dtype == dtype
    for name, tensor in expected.tensors().items():
        assert torch.equal(factors.tensors()[name], tensor)
    # A checkpoint depends on the rows, not on whether they are in memory.
    resumed = autoencoder(file, 4, **run, checkpoint=tmp_path / "memory.pt")
    assert torch.equal(resumed.codes, expected.codes)


def test_elu_and_a_callers_score_work_on_a_file(tmp_path):
    table = torch.randn(60, 8)
    file = stored(tmp_path / "t.safetensors", table)

    def score(factors):
        return float((factors.to_dense() - table).square().mean())

    run = dict(epochs=2, progress=False, activation="elu", validate=score)
    assert torch.equal(autoencoder(file, 4, **run).codes, autoencoder(table, 4, **run).codes)


def test_rows_that_are_not_finite_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ROWS", 8)
    table = torch.randn(30, 4)
    table[9, 2], table[29, 0] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match=r"table: expected finite values, got .* in 2 row\(s\): 9, 29"):
        autoencoder(stored(tmp_path / "t.safetensors", table), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_resident_size_does_not_grow_with_the_table(tmp_path):
    path, V, H = tmp_path / "t.safetensors", 98304, 512  # 201 MB
    header = {"t": {"dtype": "F32", "shape": [V, H], "data_offsets": [0, 4 * V * H]}}
    write(path, header)
    rows = torch.randn(V // 16, H).numpy().tobytes()
    with open(path, "ab") as file:
        for _ in range(16):
            file.write(rows)
    script = """
import sys
from embkern.methods import autoencoder
from embkern.io.mapped_table import TableFile
import torch

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

options = dict(batch_size=512, epochs=1, progress=False)
autoencoder(torch.randn(9000, 512), 4, **options)  # loads the libraries and allocates their buffers
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # resets the high-water mark
before = resident("VmRSS")
autoencoder(TableFile(sys.argv[1], "t"), 4, **options, checkpoint=sys.argv[1] + ".pt")
print(resident("VmHWM") - before)
"""
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc returns freed memory at once
    command = [sys.executable, "-c", script, path]
    done = subprocess.run(command, capture_output=True, text=True, env=returned)
    assert done.returncode == 0, done.stderr
    # 16 MiB of the map, three blocks of 16 MiB and the codes.
    assert int(done.stdout) < 90 * 2**20
