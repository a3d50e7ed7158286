"""Records, files and tables beyond 2^31 bytes, words and values: lookups, heads, files and the limit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from embkern.io import TableFile
from embkern.ops import gather_decode, packed_logits
from embkern.ops.packed_codes import GROUP, packed_levels, records_of
from embkern.ops.packed_format import Tier, directory_of
from embkern.tables import PackedTable
from tests.mapped_memory import lazy_words

FEW = torch.tensor([0x6B8A1C35, 0x1D2E93F7], dtype=torch.int32)
TIERS = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)  # a row of values and one of coefficients
WIDTH = 1 << 16
WIDE = Tier(False, (8,) * (WIDTH // GROUP))  # 16384 words a row, so that few rows suffice


def arguments(records: torch.Tensor, first: int) -> tuple[torch.Tensor, ...]:
    """Two rows of a word each, from word `first` on."""
    directory = torch.tensor([[first - 2**32 if first >= 2**31 else first, 0x10, 0, 0, 0]]).int()
    return records, directory, TIERS, packed_levels(), torch.ones(2), torch.eye(GROUP, 3)


@pytest.mark.parametrize("first", [2**29, 2**31 - 1, 2**31, 2**32 - 2])
def test_records_beyond_two_to_the_31st_byte_and_word(native, first):
    records = lazy_words(first + 2)
    records[-2:] = FEW
    for count in (2, 40):  # the native op has a path for few ids
        ids = torch.arange(count) % 2
        for backend in (native, "torch"):
            found = gather_decode(ids, *arguments(records, first), embedding_dim=3, backend=backend)
            expected = gather_decode(ids, *arguments(FEW, 0), embedding_dim=3, backend=backend)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("states", [1, 20])
def test_a_head_over_records_beyond_two_to_the_31st_word(native, states):
    records, hidden = lazy_words(2**31 + 2), torch.randn(states, 3)
    records[-2:] = FEW
    found = packed_logits(hidden, *arguments(records, 2**31), backend=native)
    assert torch.equal(found, packed_logits(hidden, *arguments(FEW, 0), backend=native))


@pytest.mark.slow
def test_a_table_of_more_than_two_to_the_31st_words(native):
    V = 2**31 // WIDE.words + 2 * GROUP
    ids = torch.tensor([0, V // 5, V - 2 * GROUP - 1, V - 2 * GROUP, V - 1])
    records, codes = lazy_words(V * WIDE.words), torch.randint(256, (len(ids), WIDTH), dtype=torch.uint8)
    for row, some in zip(ids.tolist(), codes, strict=True):
        records[row * WIDE.words :][: WIDE.words] = records_of(some.unsqueeze(0), WIDE.bits)[0]
    directory = directory_of(torch.zeros(V, dtype=torch.int64), [WIDE])
    tiers = torch.tensor([[0, *WIDE.bits]], dtype=torch.uint8)
    table = PackedTable(records, directory, tiers, packed_levels(), torch.ones(V), embedding_dim=WIDTH)
    for backend in (native, "torch"):
        tensors = table.packed_tensors()
        found = gather_decode(ids, *tensors, embedding_dim=WIDTH, backend=backend)
        assert torch.equal(found, codes.float() - 127.5)


def test_the_directory_names_the_largest_number_of_words():
    """Its words are places without sign: the last 32 rows begin within 2^32 words."""
    fits = 2**32 // WIDE.words
    last = directory_of(torch.zeros(fits, dtype=torch.int64), [WIDE])[-1, 0]
    assert last == -GROUP * WIDE.words  # 2^32 less than the place
    message = r"records: expected at most 2\^32 words \(16 GiB\) before the last 32 rows"
    with pytest.raises(ValueError, match=message):
        directory_of(torch.zeros(fits + 1, dtype=torch.int64), [WIDE])


@pytest.mark.slow
def test_a_file_of_more_than_two_to_the_31st_bytes(tmp_path):
    """Its tensors are mapped: the file's pages are shared and can be reclaimed."""
    if shutil.disk_usage(tmp_path).free < 6 * 2**30:
        pytest.skip("needs 6 GiB of disk")
    V = 2**29 // WIDE.words + GROUP
    records = lazy_words(V * WIDE.words)
    records[-2:] = FEW
    directory = directory_of(torch.zeros(V, dtype=torch.int64), [WIDE])
    tiers = torch.tensor([[0, *WIDE.bits]], dtype=torch.uint8)
    table = PackedTable(records, directory, tiers, packed_levels(), torch.ones(V), embedding_dim=WIDTH)
    path = tmp_path / "table.safetensors"
    table.save(path)
    try:
        assert path.stat().st_size > 2**31
        ids = torch.tensor([0, V - 1])
        assert torch.equal(PackedTable.load(path).decode(ids), table.decode(ids))
    finally:
        path.unlink()


@pytest.mark.slow
def test_a_dense_table_of_more_than_two_to_the_31st_values_is_read(tmp_path):
    """Rows beyond 2^31 values of a sparse file, of which the disk holds only what is written."""
    V, H = 2**31 // 1024 + 4, 1024
    path, rows = tmp_path / "dense.safetensors", torch.randn(3, H)
    entry = {"dtype": "F32", "shape": [V, H], "data_offsets": [0, 4 * V * H]}
    header = json.dumps({"weight": entry}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 4 * V * H)
        except OSError as error:
            pytest.skip(f"no file of 8 GiB here ({error})")
        file.seek(-4 * rows.numel(), 2)
        file.write(rows.numpy().tobytes())
    try:
        if path.stat().st_blocks * 512 > 2**30:
            pytest.skip("the file system has no sparse files")
        table = TableFile(path, "weight")
        assert torch.equal(table.read(V - 4), torch.cat([torch.zeros(1, H), rows]))
        gathered = table.gather(torch.tensor([V - 1, 0, V - 3]))
        assert torch.equal(gathered, torch.stack([rows[2], torch.zeros(H), rows[0]]))
        assert torch.equal(table.section(V - 2, V).read(), rows[1:])
    finally:
        path.unlink()
