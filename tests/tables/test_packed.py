"""PackedTable: the layout of its records, sizes, round trips through files, and refusal of invalid files."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from embkern import PackedEmbedding, PackedEmbeddingBag
from embkern.io.tensor_format import checksum
from embkern.ops.packed_format import Tier, packed_bytes
from embkern.tables.packed import FORMAT, TENSORS, PackedTable, pack
from tests.mapped_memory import mapped_file
from tests.ops.packed_problems import every_tier, packed

H, K = 45, 32
CODES = ("records", "directory", "tiers", "levels")


def make(V=70, dtype=torch.float32, basis=True, offset=True, tiers=None) -> PackedTable:
    """A table of random codes."""
    tiers = tiers or every_tier(H, K if basis else 0)
    terms = (torch.randn(K, H) if basis else None, torch.randn(H) if offset else None)
    return packed(V, H, tiers, dtype, *(t if t is None else t.to(dtype) for t in terms))[0]


def levels():
    return torch.arange(17 * 16).view(17, 16).to(torch.int8)


def test_records_have_a_stream_further_bits_and_planes_of_groups_in_their_order():
    """Row 0 has codes of 2 bits, row 1 of 3, 6 and 1 bits, row 2 none, row 3 of 4 bits as coefficients."""
    tiers = [Tier(False, (2,)), Tier(False, (3, 6, 1)), Tier(False, ()), Tier(True, (4,))]
    codes = {tier: torch.zeros(1, 32 * len(tiers[tier].bits), dtype=torch.uint8) for tier in (0, 1, 3)}
    codes[0][0, [0, 1, 4, 31]] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)  # of the steps 0, 4, 1 and 31
    codes[1][0, [0, 17, 32, 64, 84]] = torch.tensor([6, 4, 33, 1, 1], dtype=torch.uint8)
    codes[3][0, 4], codes[3][0, 22] = 12, 5
    table = pack(torch.arange(4), codes, tiers, levels(), torch.ones(4), torch.zeros(32, 70), None, 70)
    row_0 = [1 | 3 << 2 | 2 << 8, 1 << 30]
    row_1 = [2, 0, 1 | 1 << 3, 1 | 1 << 5, *[1, 0, 0, 0, 0, 1]]  # the pair of value 84 is step 1, number 1
    row_3 = [0, 1 << 2 * 9, 3 << 2, 1 << 8 * 2 + 2]
    assert table.records.tolist() == [*row_0, *row_1, *row_3]
    assert table.directory.tolist() == [[0, 0x3210, 0, 0, 0]]
    assert table.tiers.tolist() == [[0, 2, 0, 0], [0, 3, 6, 1], [0, 0, 0, 0], [1, 4, 0, 0]]


def test_the_directory_has_an_entry_for_every_32_rows():
    tiers = [Tier(False, (bits,)) for bits in range(1, 9)] * 2
    tier_of = torch.arange(70) % 16
    codes = {tier: torch.zeros(int((tier_of == tier).sum()), 32, dtype=torch.uint8) for tier in range(16)}
    table = pack(tier_of, codes, tiers, levels(), torch.ones(70), None, None, 9)
    every = [0x76543210, 0xFEDCBA98 - 2**32]  # tier 15 sets the sign bit
    assert table.directory.tolist() == [
        [0, *every, *every],
        [4 * 36, *every, *every],
        [8 * 36, 0x543210, 0, 0, 0],
    ]
    assert torch.equal(table.tier_of_rows(), tier_of)
    assert len(table.records) == 8 * 36 + 1 + 2 + 3 + 4 + 5 + 6


@pytest.mark.parametrize("V", [1, 7, 33, 20000])
@pytest.mark.parametrize("basis", [True, False])
def test_rows_are_what_was_packed(V, basis):
    tiers = every_tier(H, K if basis else 0)
    D, b = torch.randn(K, H).double() if basis else None, torch.randn(H).double()
    table, values, transform = packed(V, H, tiers, torch.float64, D, b)
    rows = values[:, :H]
    if basis:
        rows = torch.where(transform.unsqueeze(1), values[:, :K] @ D, rows)
    expected = table.scales.unsqueeze(1) * rows + b
    assert_close(table.to_dense(), expected)  # 20000 rows are decoded in several blocks
    ids = torch.tensor([[V - 1, 0], [V // 2, V - 1]])
    assert_close(table.decode(ids), expected[ids])
    assert (table.num_embeddings, table.embedding_dim, table.dtype) == (V, H, torch.float64)


def test_rows_of_no_bits_decode_to_the_offset():
    table = packed(40, H, [Tier(False, ())], offset=torch.arange(H).float())[0]
    assert torch.equal(table.to_dense(), torch.arange(H).float().expand(40, H))


def test_tiers_are_described():
    assert str(Tier(False, (3, 3))) == "3 bits"
    assert str(Tier(False, (4, 2))) == "4-2"
    assert str(Tier(True, (3, 2, 1, 1))) == "basis 3-2-1-1"
    assert Tier(True, (3, 2, 1, 1)).words == 7
    written = [Tier(False, (3, 3)), Tier(False, (0, 4)), Tier(False, (2, 0)), Tier(True, (5,))]
    read = [Tier(False, (3, 3)), Tier(False, (0, 4)), Tier(False, (2,)), Tier(True, (5,))]
    assert make(tiers=written).described_tiers() == read


def test_a_value_depends_on_its_step_and_those_after_it():
    """One code of a row of two groups, in a ring: it is part of the windows of six steps."""
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    arguments = ([Tier(False, (2, 2))], levels(), torch.ones(1), None, None, 64)
    nothing = pack(torch.zeros(1, dtype=torch.int64), {0: codes}, *arguments).to_dense()[0]
    codes[0, 5] = 3  # of step 5, as the values of 4 x 4 are transposed
    table = pack(torch.zeros(1, dtype=torch.int64), {0: codes}, *arguments)
    changed = torch.nonzero(table.to_dense()[0] != nothing).flatten().tolist()
    assert sorted(i // 16 * 16 + i % 4 * 4 + i // 4 % 4 for i in changed) == [0, 1, 2, 3, 4, 5]
    codes[0, 5], codes[0, 0] = 0, 3
    table = pack(torch.zeros(1, dtype=torch.int64), {0: codes}, *arguments)
    changed = torch.nonzero(table.to_dense()[0] != nothing).flatten().tolist()
    assert sorted(i // 16 * 16 + i % 4 * 4 + i // 4 % 4 for i in changed) == [0, 59, 60, 61, 62, 63]


@pytest.mark.parametrize("V", [1, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("basis", [True, False])
def test_packed_bytes_and_the_size_of_the_file_agree_with_nbytes(tmp_path, V, dtype, basis):
    tiers = [tier for tier in every_tier(H, K if basis else 0) if tier.words]
    table = make(V, dtype, basis, offset=False, tiers=tiers)
    rows = table.tier_of_rows().bincount(minlength=len(tiers))
    assert table.nbytes == packed_bytes(rows, tiers, dtype.itemsize, K if basis else 0, H)
    table.save(tmp_path / "t")
    with open(tmp_path / "t", "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert os.path.getsize(tmp_path / "t") == header + table.nbytes
    assert header < 1500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("offset", [True, False])
def test_round_trip(tmp_path, dtype, basis, offset):
    saved = make(dtype=dtype, basis=basis, offset=offset)
    saved.save(tmp_path / "t.safetensors")
    loaded = PackedTable.load(tmp_path / "t.safetensors")
    assert loaded.tensors().keys() == saved.tensors().keys()
    assert len(loaded.tensors()) == 5 + basis + offset
    assert all(torch.equal(loaded.tensors()[name], tensor) for name, tensor in saved.tensors().items())
    assert torch.equal(loaded.to_dense(), saved.to_dense())
    assert os.listdir(tmp_path) == ["t.safetensors"], "no temporary file stays"


def test_saving_replaces_a_file_atomically(tmp_path, monkeypatch):
    first, second = make(7), make(9)
    first.save(tmp_path / "t")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("embkern.io.tensor_format.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            second.save(tmp_path / "t")
    assert PackedTable.load(tmp_path / "t").num_embeddings == 7
    second.save(tmp_path / "t")
    assert PackedTable.load(tmp_path / "t").num_embeddings == 9
    assert os.listdir(tmp_path) == ["t"]


def test_views_and_leaves_are_saved(tmp_path):
    table = make()
    strided = replace(
        table,
        scales=table.scales.repeat_interleave(2)[::2].requires_grad_(),
        basis=table.basis.t().contiguous().t(),
        directory=table.directory.repeat(1, 2)[:, :5],
    )
    strided.save(tmp_path / "t")
    assert torch.equal(PackedTable.load(tmp_path / "t").to_dense(), table.to_dense())


def test_a_cast_leaves_the_codes_alone():
    table = replace(make(), facts={"note": 1})
    for cast in (table.to(torch.bfloat16), table.to(dtype=torch.bfloat16), table.to("cpu", torch.bfloat16)):
        assert {t.dtype for n, t in cast.tensors().items() if n not in CODES} == {torch.bfloat16}
        assert all(torch.equal(getattr(cast, name), getattr(table, name)) for name in CODES)
        assert all(getattr(cast, name).dtype == getattr(table, name).dtype for name in CODES)
        assert cast.facts == {"note": 1}
        assert cast.decode(torch.tensor(3)).dtype == torch.bfloat16
    assert table.dtype == torch.float32


def test_a_cast_to_integers_is_refused():
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype, got torch.int8"):
        make().to(torch.int8)


def test_tensors_are_validated_when_asked():
    table = make()
    damaged = replace(table, records=table.records[:-1], check=False)
    assert damaged.to("cpu").records is damaged.records
    with pytest.raises(ValueError, match=r"records: expected \d+ words"):
        damaged.validate()
    with pytest.raises((ValueError, IndexError)):  # of the native op and of plain torch
        damaged.decode(torch.arange(70))


def test_a_table_of_the_meta_device_has_shapes():
    table = make()
    meta = table.to("meta")
    assert all(tensor.is_meta for tensor in meta.tensors().values())
    assert meta.nbytes == table.nbytes
    assert meta.decode(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, H)
    with pytest.raises(ValueError, match="levels: expected shape"):
        replace(meta, levels=meta.levels[:1])


def edited(tensor, entry, value):
    tensor = tensor.clone()
    tensor[entry] = value
    return tensor


# Changes to the tensors of a table that must be refused, in memory and in a file.
CORRUPT = [
    (lambda t: dict(tiers=t["tiers"][:, 0]), "tiers: expected shape"),
    (lambda t: dict(tiers=t["tiers"][:, :1]), "tiers: expected shape"),
    (lambda t: dict(tiers=t["tiers"].repeat(2, 1)), "tiers: expected shape .* T up to 16"),
    (lambda t: dict(tiers=edited(t["tiers"], (0, 1), 9)), "tiers: expected 0 or 1, then 0 to 8 bits"),
    (lambda t: dict(tiers=edited(t["tiers"], (0, 0), 2)), "tiers: expected 0 or 1, then 0 to 8 bits"),
    (lambda t: dict(tiers=edited(t["tiers"], (0, 1), 5)), "directory: the places of the records do not"),
    (lambda t: dict(tiers=torch.nn.functional.pad(t["tiers"], (0, 1), value=1)), "tiers: expected at most 2"),
    (lambda t: dict(tiers=edited(t["tiers"], (-1, 2), 1)), "tiers: expected at most 1 groups, got basis"),
    (lambda t: dict(tiers=t["tiers"][:4]), "expected at most|directory: expected tiers below 4, got"),
    (lambda t: dict(directory=t["directory"][:2]), r"directory: expected shape \(3, 5\), got \(2, 5\)"),
    (lambda t: dict(directory=edited(t["directory"], (1, 0), 7)), "directory: the places of the records"),
    (
        lambda t: dict(directory=edited(t["directory"], (1, 1), -1)),
        "directory: expected tiers below 15, got 15",
    ),
    (lambda t: dict(records=t["records"][:-1]), r"records: expected \d+ words, got \d+"),
    (lambda t: dict(levels=t["levels"][0]), "levels: expected shape"),
    (lambda t: dict(scales=t["scales"][:-7]), r"directory: expected shape \(2, 5\), got \(3, 5\)"),
    (lambda t: dict(basis=t["basis"][:-1]), "basis: expected shape .* a multiple of 32"),
    (lambda t: dict(offset=t["offset"][:-1]), r"offset: expected shape \(45,\)"),
]
WRONG_DTYPES = [
    (lambda t: dict(records=t["records"].long()), "records: expected dtype torch.int32"),
    (lambda t: dict(directory=t["directory"].float()), "directory: expected dtype torch.int32"),
    (lambda t: dict(tiers=t["tiers"].char()), "tiers: expected dtype torch.uint8"),
    (lambda t: dict(levels=t["levels"].float()), "levels: expected dtype torch.int8"),
    (lambda t: dict(basis=t["basis"].half()), "basis: expected dtype torch.float32 as in scales"),
    (
        lambda t: {name: t[name].int() for name in ("scales", "basis", "offset")},
        "scales: expected a floating-point dtype",
    ),
]


@pytest.mark.parametrize(("change", "message"), CORRUPT + WRONG_DTYPES)
def test_tensors_that_do_not_fit_are_refused(change, message):
    tensors = make().tensors()
    error = TypeError if "dtype" in message else ValueError
    with pytest.raises(error, match=message):
        PackedTable(**tensors | change(tensors), embedding_dim=H)


@pytest.mark.parametrize(("change", "message"), CORRUPT + WRONG_DTYPES)
def test_a_file_of_tensors_that_do_not_fit_is_refused_with_its_name(tmp_path, change, message):
    """Although the checksums are right: another program wrote the file."""
    tensors = make().tensors()
    tensors |= {name: tensor.contiguous() for name, tensor in change(tensors).items()}
    checked = {**tensors, "embedding_dim": torch.tensor(H)}
    checksums = json.dumps({name: checksum(tensor) for name, tensor in checked.items()})
    metadata = {"format": FORMAT.name, "embedding_dim": str(H), "checksums": checksums}
    save_file(tensors, tmp_path / "t", metadata)
    with pytest.raises(ValueError, match=f"{tmp_path / 't'}: ({message})"):
        PackedTable.load(tmp_path / "t")


def test_coefficients_without_a_basis_are_refused():
    tensors = make().tensors()
    del tensors["basis"]
    with pytest.raises(ValueError, match="tiers: expected at most 0 groups, got basis 4"):
        PackedTable(**tensors, embedding_dim=H)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a file of a packed table, found none"):
        PackedTable.load(tmp_path / "none")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "t"
    make().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            PackedTable.load(path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_changed_bit_of_every_tensor_is_noticed(tmp_path, name):
    path = tmp_path / "t"
    make().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    tensors[name].view(torch.uint8).flatten()[-1] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"{name} was changed after it was saved"):
        PackedTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "expected format 'embkern.packed/2', got None"),
        (lambda t, m: m.update(format="embkern.factors/1"), "got 'embkern.factors/1'"),
        (lambda t, m: m.pop("checksums"), "metadata is damaged"),
        (lambda t, m: m.update(checksums="[]"), "metadata is damaged"),
        (lambda t, m: m.update(checksums="{"), "metadata is damaged"),
        (lambda t, m: m.pop("embedding_dim"), "metadata is damaged"),
        (lambda t, m: m.update(embedding_dim="45.0"), "metadata is damaged"),
        (lambda t, m: m.update(embedding_dim="46"), "embedding_dim was changed after it was saved"),
        (lambda t, m: t.pop("scales"), "expected records, directory, .* got"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "expected records, directory"),
        (lambda t, m: (t.pop("tiers"), m.update(checksums="{}")), "expected records, directory"),
    ],
)
def test_edited_files_are_refused(tmp_path, change, message):
    path = tmp_path / "t"
    make().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        PackedTable.load(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_a_loaded_table_is_mapped(tmp_path):
    """Processes that load a file share its pages: the codes are not copied, nor by a module over them."""
    path = tmp_path / "table.safetensors"
    make().save(path)
    loaded = PackedTable.load(path)
    for records in (loaded.records, PackedEmbedding(loaded).records, PackedEmbeddingBag(loaded).records):
        assert mapped_file(records) == str(path)
