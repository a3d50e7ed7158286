"""``embkern.inspection``: a model's table described, and compared with the dense one."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import embkern
from embkern import inspection
from embkern.models.checkpoint import stored_table
from embkern.models.rate_plot import bits_by_id
from tests.example_models import H, V, tiny_bert
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import PACKED, SVD, both_kinds

pytestmark = pytest.mark.usefixtures("quantizing")


def test_inspect_dense_and_compressed(source, tmp_path):
    dense = inspection.inspect(source)
    assert (dense.compressed, dense.heads) == (False, ["cls.predictions.decoder"])
    assert dense.table_bytes == V * H * 4
    assert dense.ranks[0].rank == H // 2
    assert all(each.ratio == pytest.approx(dense.table_bytes / each.compressed_bytes) for each in dense.ranks)
    report = embkern.compress(source, **SVD, output=tmp_path / "small")
    small = inspection.inspect(tmp_path / "small")
    assert (small.compressed, small.rank, small.table_bytes) == (True, 5, report.compressed_bytes)
    assert small.heads == ["cls.predictions.decoder"]
    report = embkern.compress(source, **PACKED, output=tmp_path / "packed")
    packed = inspection.inspect(tmp_path / "packed")
    assert (packed.rank, packed.tiers, packed.table_bytes) == (None, report.tiers, report.compressed_bytes)
    assert packed.model_bytes == report.model_bytes_after
    assert packed.facts()["rows at 2 bits"] == "25 (200 bytes)"


def test_a_compressed_model_brings_its_report_and_a_picture(source, tmp_path):
    pytest.importorskip("matplotlib")
    report = embkern.compress(source, **PACKED, output=tmp_path / "packed")
    for ending, first in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        picture = tmp_path / f"bits.{ending}"
        summary = inspection.inspect(tmp_path / "packed", plot=picture)
        assert picture.read_bytes().startswith(first)
        assert summary.report.table == report.table
    (tmp_path / "packed" / "embkern_report.json").unlink()
    assert inspection.inspect(tmp_path / "packed").report is None
    embkern.compress(source, **SVD, output=tmp_path / "small")
    for name in (source, tmp_path / "small"):
        with pytest.raises(ValueError, match="plot: expected a "):
            inspection.inspect(name, plot=tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_bits_are_those_of_the_tiers(source):
    report = embkern.compress(source, **PACKED)
    table = stored_table(report.model)
    bits = bits_by_id(table)
    assert len(bits) == table.num_embeddings
    assert float(bits.sum()) * table.embedding_dim / 8 == sum(tier.bytes for tier in report.tiers)


@both_kinds
def test_evaluate_agrees_with_the_report(recipe, source, text, tmp_path):
    report = embkern.compress(source, **recipe, output=tmp_path / "small", text=text)
    result = inspection.evaluate(tmp_path / "small", source, text=text)
    assert result.table.direction_error == pytest.approx(report.table.direction_error)
    assert result.table.neighbor_overlap == report.table.neighbor_overlap
    assert result.sentences.mean_cosine == pytest.approx(report.sentences.mean_cosine, abs=1e-5)
    assert (result.model_bytes_before, result.model_bytes_after) == (
        report.model_bytes_before,
        report.model_bytes_after,
    )
    with pytest.raises(ValueError, match="model: expected one compressed by embkern, got a dense one"):
        inspection.evaluate(source, source)
    with pytest.raises(ValueError, match="compressed already"):
        inspection.evaluate(tmp_path / "small", tmp_path / "small")
    tiny_bert(vocab_size=50).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="against: expected a table of 101 x 32 .* got 50 x 32"):
        inspection.evaluate(tmp_path / "small", tmp_path / "other")
