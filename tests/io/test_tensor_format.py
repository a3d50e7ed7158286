"""Files of tensors: older files are still read, and errors name a damaged file."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embkern.io import tensor_format
from embkern.io.tensor_format import TensorFormat, checksum, checksum_of_parts
from embkern.tables.factors import Factors
from embkern.tables.packed import PackedTable
from embkern.text.counts import TokenCounts

DATA = Path(__file__).parents[1] / "data"
FORMAT = TensorFormat("test/1", "a test", ("a",), ("b",), settings=("width", "note"), checked=("width",))


def save(path, **tensors):
    FORMAT.save(path, {"a": torch.arange(6.0)} | tensors, width=7, note={"of": [1, None]})


def load(path):
    return FORMAT.load(path, lambda tensors, settings: (tensors, settings))


def edit(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("optional", [{}, {"b": torch.ones(2, 3).t().half()}], ids=["a", "a and b"])
def test_what_is_saved_is_loaded(tmp_path, optional):
    save(tmp_path / "t", **optional)
    tensors, settings = load(tmp_path / "t")
    assert tensors.keys() == {"a", *optional}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in optional.items())
    assert settings == {"width": 7, "note": {"of": [1, None]}}


@pytest.mark.parametrize("spaces", range(1, 8))
def test_tensors_that_a_file_does_not_align_are_aligned(tmp_path, spaces):
    save(tmp_path / "t", b=torch.arange(3))
    data = (tmp_path / "t").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * spaces
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    tensors = load(tmp_path / "t")[0]
    assert torch.equal(tensors["a"], torch.arange(6.0))
    assert torch.equal(tensors["b"], torch.arange(3))
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(10.0)[3:4:2],  # a single element is contiguous whatever its stride
        torch.arange(10.0).view(2, 5).t()[:1, :1],
        torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,  # its negative bit is set
        torch.zeros(0, 4)[:, ::2],
    ],
    ids=["one element", "one of a matrix", "negative bit", "empty"],
)
def test_views_are_saved_with_the_values_they_show(tmp_path, view):
    save(tmp_path / "t", b=view)
    assert torch.equal(load(tmp_path / "t")[0]["b"], view)
    assert checksum(view) == checksum(torch.tensor(view.tolist()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format="test/2"), "expected format 'test/1', got 'test/2'"),
        (lambda t, m: m.pop("width"), "its metadata is damaged .*width"),
        (
            lambda t, m: m.update(width='"7"'),
            "its metadata is damaged .*expected a 64-bit integer, got '7'",
        ),
        (lambda t, m: m.update(width="8"), "width was changed after it was saved"),
        (lambda t, m: m.update(note="{"), "its metadata is damaged"),
        (lambda t, m: m.update(checksums="3"), "its metadata is damaged .*checksums: expected .*got 3"),
        (lambda t, m: m.update(checksums="{}"), r"expected a and optionally b, got \['a', 'b'\]"),
        (lambda t, m: t.pop("a"), r"expected a and optionally b, got \['b'\]"),
        (lambda t, m: t.pop("b"), r"expected a and optionally b, got \['a'\]"),
        (lambda t, m: t.update(c=t["b"] + 1), r"expected a and optionally b, got \['a', 'b', 'c'\]"),
        (
            lambda t, m: t.update(b=t["b"] + 1),
            "b was changed .* .expected crc32:.*, got crc32:",
        ),
    ],
)
def test_damage_is_named_with_the_file(tmp_path, change, message):
    path = tmp_path / "t"
    save(path, b=torch.zeros(3))
    edit(path, change)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        load(path)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x")], ids=repr)
def test_what_cannot_be_built_names_the_file(tmp_path, error):
    def build(tensors, settings):
        raise error

    save(tmp_path / "t")
    with pytest.raises(ValueError, match=f"{tmp_path / 't'}: .*x"):
        FORMAT.load(tmp_path / "t", build)


def test_a_checksum_is_that_of_the_bytes():
    tensor = torch.arange(12.0).view(4, 3)
    assert checksum(tensor) == checksum_of_parts(tensor.split(1)) == checksum(tensor.t().contiguous().t())
    assert checksum(torch.tensor([1, 2, 3], dtype=torch.uint8)) == "crc32:55bc801d"
    assert checksum(tensor[:0]) == "crc32:00000000"


# Objects, and the metadata that the first version wrote for them.
OLD = [
    (
        Factors(torch.ones(2, 1), torch.ones(1, 3)),
        {
            "format": "embkern.factors/1",
            "activation": "null",
            "checksums": '{"codes": "crc32:d5065190", "basis": "crc32:dc7c4e94"}',
        },
    ),
    (
        PackedTable(
            records=torch.zeros(2, dtype=torch.int32),
            directory=torch.zeros(1, 5, dtype=torch.int32),
            tiers=torch.tensor([[0, 1]], dtype=torch.uint8),
            levels=torch.zeros(4, 128, dtype=torch.int16),
            scales=torch.ones(2),
            embedding_dim=32,
        ),
        {
            "format": "embkern.packed/1",
            "embedding_dim": "32",
            "checksums": '{"records": "crc32:6522df69", "directory": "crc32:0fd59b8d", '
            '"tiers": "crc32:36de2269", "levels": "crc32:efb5af2e", "scales": "crc32:d5065190", '
            '"embedding_dim": "crc32:9c54bd3f"}',
        },
    ),
    (
        TokenCounts(torch.tensor([4, 0]), 3, "sha256:ab", 2),
        {
            "format": "embkern.counts/1",
            "facts": '{"texts": 3, "fingerprint": "sha256:ab", "vocabulary_size": 2}',
            "checksums": '{"counts": "crc32:388a07d2"}',
        },
    ),
]


@pytest.mark.parametrize(("saved", "metadata"), OLD, ids=lambda each: type(each).__name__)
def test_the_first_formats_are_still_written_and_read(tmp_path, saved, metadata):
    saved.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        written = file.metadata()
    assert written.pop("header").startswith("crc32:"), "which readers of the first version ignore"
    assert written == metadata
    tensors = load_file(tmp_path / "new")
    save_file(tensors, tmp_path / "old", metadata)
    loaded = type(saved).load(tmp_path / "old")
    assert all(torch.equal(getattr(loaded, name), tensor) for name, tensor in tensors.items())
    assert [value for value in vars(loaded).values() if not isinstance(value, torch.Tensor)] == [
        value for value in vars(saved).values() if not isinstance(value, torch.Tensor)
    ]


# Files without a checksum of the header: type, checksum of the tensors in the order of their names, settings.
BEFORE = {
    "packed-1": (PackedTable, "crc32:5d9f0b56", {"embedding_dim": 40}),
    "packed-1-basis": (PackedTable, "crc32:b9db7420", {"embedding_dim": 40}),
    "packed-2": (PackedTable, "crc32:357c2731", {"embedding_dim": 40}),
    "packed-2-basis": (PackedTable, "crc32:ea371273", {"embedding_dim": 40}),
    "factors-1": (Factors, "crc32:e069da17", {"activation": None}),
    "factors-1-elu": (Factors, "crc32:b1ea9849", {"activation": "elu"}),
    "counts-1": (
        TokenCounts,
        "crc32:c40174da",
        {"texts": 12, "fingerprint": "sha256:0123456789abcdef0123456789abcdef", "vocabulary_size": 68},
    ),
}


def tensors_of(loaded):
    return {name: value for name, value in vars(loaded).items() if isinstance(value, torch.Tensor)}


def checksum_of(loaded):
    return checksum_of_parts(tensor for _, tensor in sorted(tensors_of(loaded).items()))


@pytest.mark.parametrize("name", BEFORE)
def test_files_written_before_hold_what_they_held(tmp_path, name):
    kind, expected, settings = BEFORE[name]
    loaded = kind.load(DATA / f"{name}.safetensors")
    assert checksum_of(loaded) == expected
    assert {key: getattr(loaded, key) for key in settings} == settings
    loaded.save(tmp_path / "again")
    again = kind.load(tmp_path / "again")
    assert checksum_of(again) == expected
    assert {key: getattr(again, key) for key in settings} == settings


@pytest.mark.parametrize("name", BEFORE)
def test_equal_content_gives_equal_bytes(tmp_path, name):
    loaded = BEFORE[name][0].load(DATA / f"{name}.safetensors")
    files = set()
    for number in range(8):  # a random order of four entries is the sorted one in 1 of 24 files
        loaded.save(tmp_path / str(number))
        files.add((tmp_path / str(number)).read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("name", BEFORE)
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, name):
    kind, path = BEFORE[name][0], tmp_path / "f"
    kind.load(DATA / f"{name}.safetensors").save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    # More in the header, whose bits differ in meaning.
    for at in [*draw.sample(range(header), 300), *draw.sample(range(header, len(whole)), 60)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            kind.load(path)


def edit_metadata(path, **metadata):
    """Change the metadata of a saved file and remove the checksum of its header."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **metadata}
    metadata.pop("header", None)
    save_file(tensors, path, metadata)


HOSTILE = [
    "true",
    "1.0",
    '"32"',
    "null",
    "[32]",
    "0",
    "-32",
    "1e3",
    "Infinity",
    str(2**40),
    str(2**70),
    "9" * 5000,
]


@pytest.mark.parametrize("value", [*HOSTILE, str(2**31), "65", "[" * 10**5])
def test_a_width_that_the_tiers_do_not_describe_is_refused(tmp_path, value):
    path = tmp_path / "p"
    PackedTable.load(DATA / "packed-1.safetensors").save(path)  # two groups: 64 values at most
    with safe_open(path, "pt") as file:
        checksums = json.loads(file.metadata()["checksums"])
    if value.lstrip("-").isdigit() and abs(int(value[:30])) < 2**63:
        checksums["embedding_dim"] = checksum(torch.tensor(int(value)))
    edit_metadata(path, embedding_dim=value, checksums=json.dumps(checksums))
    with pytest.raises(
        ValueError, match=re.escape(str(path)) + ".*(metadata is damaged|embedding_dim: expected)"
    ):
        PackedTable.load(path)


def test_a_basis_without_rows_bounds_no_width(tmp_path):
    path, H = tmp_path / "p", 2**40
    PackedTable.load(DATA / "packed-1.safetensors").save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"embedding_dim": str(H)}
    metadata.pop("header", None)
    tensors["basis"] = torch.zeros(0, H, dtype=tensors["scales"].dtype)  # no bytes
    checked = {**tensors, "embedding_dim": torch.tensor(H)}
    metadata["checksums"] = json.dumps({name: checksum(tensor) for name, tensor in checked.items()})
    save_file(tensors, path, metadata)
    with pytest.raises(
        ValueError, match="basis: expected .K, H. with K of at least 32, or None, got no rows"
    ):
        PackedTable.load(path)


@pytest.mark.parametrize("value", ["[" * 10**5, '{"a":' * 10**5, '"' + "[" * 10**5 + '"', "9" * 5000, "NaN"])
@pytest.mark.parametrize(
    ("name", "setting"), [("factors-1", "activation"), ("counts-1", "facts"), ("counts-1", "checksums")]
)
def test_metadata_of_any_depth_and_size_is_refused(tmp_path, name, setting, value):
    path, kind = tmp_path / "f", BEFORE[name][0]
    kind.load(DATA / f"{name}.safetensors").save(path)
    edit_metadata(path, **{setting: value})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        kind.load(path)


@pytest.mark.parametrize(
    "facts", [dict(texts=True), dict(texts=1.5), dict(vocabulary_size="68"), dict(fingerprint=3)]
)
def test_facts_of_counts_of_other_types_are_refused(tmp_path, facts):
    path = tmp_path / "c"
    TokenCounts(torch.ones(3).long(), 1, "sha256:ab", 3).save(path)
    edit_metadata(
        path, facts=json.dumps({"texts": 1, "fingerprint": "sha256:ab", "vocabulary_size": 3, **facts})
    )
    with pytest.raises(ValueError, match="facts: expected integers and a fingerprint"):
        TokenCounts.load(path)


@pytest.mark.parametrize("codes", [(0, 2), (3, 0)], ids=str)
def test_factors_of_no_rows_or_no_rank_are_refused(codes):
    with pytest.raises(ValueError, match="expected V, r and H of at least 1"):
        Factors(torch.zeros(codes), torch.zeros(codes[1], 5))


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    path, other = tmp_path / "f", Factors(torch.zeros(3, 2), torch.zeros(2, 5))
    Factors(torch.ones(3, 2), torch.ones(2, 5)).save(path)
    opened = []

    def opening(*args, **kwargs):
        """Open the header; safetensors opens the file again for the tensors."""
        if not opened:
            other.save(path)
        opened.append(path)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(tensor_format, "safe_open", opening)
    assert not Factors.load(path).codes.any()
    assert len(opened) == 2
