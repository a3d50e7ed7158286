"""Checkpoints: refusal of damaged ones, and the dtype in which a table is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

T = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from embkern.models.checkpoint import stored_table
from tests.example_models import build
from tests.models.compressing import assert_same_table, compressed, edit, of_table, reload

pytestmark = pytest.mark.usefixtures("quantizing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_tables_are_stored_in_16_bits_and_reproduce_the_same_bytes(tmp_path, dtype):
    model = compressed(build("gemma3").to(dtype), "packed")
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    nbytes = stored_table(model).nbytes
    assert (stored_table(model).dtype, model.get_input_embeddings().dtype) == (stored, dtype)
    loaded = reload(model, tmp_path / "first")
    assert (loaded.dtype, loaded.get_input_embeddings().dtype) == (dtype, dtype)
    assert_same_table(loaded.get_input_embeddings(), model.get_input_embeddings())
    file = load_file(tmp_path / "first" / "model.safetensors")
    guard = "model.embed_tokens.weight"
    assert file[guard].shape == (0,)
    table = {n: t for n, t in file.items() if n.startswith("model.embed_tokens.") and n != guard}
    assert sum(t.nbytes for t in table.values()) == nbytes
    assert {t.dtype for t in table.values() if t.is_floating_point()} == {stored}
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    wider = type(model).from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert wider.get_input_embeddings().dtype == torch.float32
    wider.save_pretrained(tmp_path / "wider")
    for name, tensor in load_file(tmp_path / "wider" / "model.safetensors").items():
        assert name not in table or torch.equal(tensor, table[name]), name


def test_values_that_overflow_the_stored_dtype_are_refused(tmp_path):
    model = compressed(build("bert"), "packed")
    with torch.no_grad():
        model.get_input_embeddings().scales[3] = 1e6
    with pytest.raises(
        ValueError, match="scales: expected values in the range of the stored dtype torch.float16"
    ):
        model.save_pretrained(tmp_path)


@pytest.fixture
def saved_packed(tmp_path) -> Path:
    compressed(build("bert-backbone"), "packed").save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def rewrite(path: Path, change) -> None:
    """Save a checkpoint again with tensors changed by name."""
    tensors = {
        key: value.clone() for key, value in load_file(path).items()
    }  # copies, as the file they map is rewritten
    change({key.rpartition(".")[2]: (tensors, key) for key in tensors})
    save_file(tensors, path, {"format": "pt"})


def test_a_truncated_or_edited_checkpoint_is_refused(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        T.BertModel.from_pretrained(saved)
    path.write_bytes(whole)
    rewrite(path, lambda at: at["codes"][0][at["codes"][1]].add_(1))
    with pytest.raises(ValueError, match="codes was changed after it was saved"):
        T.BertModel.from_pretrained(saved)
    rewrite(path, lambda at: at["codes"][0].pop(at["codes"][1]))
    with pytest.raises(ValueError, match="does not hold the compressed table"):
        T.BertModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("records", lambda t: t.add_(1), "got"),
        ("scales", lambda t: t.add_(1), "got"),
        ("tiers", lambda t: t[0, 1:].fill_(9), "tiers: expected 0 or 1, then 0 to 8 bits"),
        ("tiers", lambda t: t[0, 1:].fill_(7), "directory: the places of the records do not"),
        ("tiers", lambda t: t[1, 0].fill_(2), "tiers: expected 0 or 1"),
        ("directory", lambda t: t[0, 1].fill_(-1), "directory: expected tiers below 4, got 15"),
        ("directory", lambda t: t[1, 0].fill_(0), "directory: the places of the records do not follow"),
    ],
)
def test_corrupt_packed_tables_are_refused(saved_packed, name, change, message):
    rewrite(saved_packed / "model.safetensors", lambda at: change(at[name][0][at[name][1]]))
    with pytest.raises(ValueError, match=f"{name} was changed after it was saved"):
        T.BertModel.from_pretrained(saved_packed)
    edit(saved_packed / "config.json", of_table(checksums={}))
    if message == "got":  # without its checksum it is a valid table of other rows
        T.BertModel.from_pretrained(saved_packed)
    else:
        with pytest.raises(ValueError, match=f"the saved embedding is damaged: .*{message}"):
            T.BertModel.from_pretrained(saved_packed)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("records", torch.float32), ("records", torch.int64), ("tiers", torch.int32), ("scales", torch.int32)],
)
def test_tensors_of_another_dtype_are_not_cast(saved_packed, name, dtype):
    edit(saved_packed / "config.json", of_table(checksums={}))
    rewrite(saved_packed / "model.safetensors", lambda at: cast(*at[name], dtype))
    with pytest.raises(
        ValueError, match=f"expected (torch|a floating-point).* for .*{name}, got (torch|an unknown)"
    ):
        T.BertModel.from_pretrained(saved_packed)


def cast(tensors, key, dtype):
    tensors[key] = tensors[key].to(dtype)
