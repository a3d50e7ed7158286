"""Files of tensors: those written before are read for ever, and damage is named."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embkern.factors import Factors
from embkern.frequencies import TokenCounts
from embkern.packed import PackedTable
from embkern.tensor_file import TensorFormat, checksum, checksum_of_parts

FORMAT = TensorFormat("test/1", "a test", ("a",), ("b",), settings=("width", "note"), checked=("width",))


def save(path, **tensors):
    FORMAT.save(path, {"a": torch.arange(6.0)} | tensors, width=7, note={"of": [1, None]})


def load(path):
    return FORMAT.load(path, lambda tensors, settings: (tensors, settings))


def edit(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("optional", [{}, {"b": torch.ones(2, 3).t().half()}], ids=["a", "a and b"])
def test_what_is_saved_is_loaded(tmp_path, optional):
    save(tmp_path / "t", **optional)
    tensors, settings = load(tmp_path / "t")
    assert tensors.keys() == {"a", *optional}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in optional.items())
    assert settings == {"width": 7, "note": {"of": [1, None]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format="test/2"), "expected format 'test/1', got 'test/2'"),
        (lambda t, m: m.pop("width"), "its metadata is damaged .*width"),
        (lambda t, m: m.update(width='"7"'), "its metadata is damaged .*str"),
        (lambda t, m: m.update(width="8"), "width was changed after it was saved"),
        (lambda t, m: m.update(note="{"), "its metadata is damaged"),
        (lambda t, m: m.update(checksums="3"), "its metadata is damaged .*checksums: expected .*got 3"),
        (lambda t, m: m.update(checksums="{}"), r"expected a and perhaps b, got \['a', 'b'\]"),
        (lambda t, m: t.pop("a"), r"expected a and perhaps b, got \['b'\]"),
        (lambda t, m: t.pop("b"), r"expected a and perhaps b, got \['a'\]"),
        (lambda t, m: t.update(c=t["b"] + 1), r"expected a and perhaps b, got \['a', 'b', 'c'\]"),
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


# What the first release wrote, to the letter.
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
def test_the_formats_of_the_first_release_are_kept(tmp_path, saved, metadata):
    saved.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == metadata
    tensors = load_file(tmp_path / "new")
    save_file(tensors, tmp_path / "old", metadata)
    loaded = type(saved).load(tmp_path / "old")
    assert all(torch.equal(getattr(loaded, name), tensor) for name, tensor in tensors.items())
    assert [value for value in vars(loaded).values() if not isinstance(value, torch.Tensor)] == [
        value for value in vars(saved).values() if not isinstance(value, torch.Tensor)
    ]
