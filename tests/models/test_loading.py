"""``embkern.models.loading``: missing and damaged models, tokenizers and reports."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

import embkern
from embkern import Report, inspection
from embkern.models.report import read_report
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import SVD

pytestmark = pytest.mark.usefixtures("quantizing")


def test_missing_and_damaged_models(tmp_path, source):
    with pytest.raises(
        FileNotFoundError, match="model: expected a directory or a name on the hub, found none"
    ):
        embkern.compress(tmp_path / "nowhere", **SVD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model: .*empty cannot be loaded"):
        embkern.compress(tmp_path / "empty", **SVD)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model: .*dense cannot be loaded"):
        embkern.compress(source, **SVD)


def test_a_table_that_the_checkpoint_lacks_is_named(source, tmp_path):
    embkern.compress(source, **SVD, output=tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be loaded: You set `ignore_mismatched_sizes` to `False`"):
        inspection.inspect(tmp_path / "small")
    quantization["table"]["head"] = "dense"
    quantization["format_version"] = 1  # which has no checksum of the description
    del quantization["checksum"]
    (tmp_path / "small" / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )
    with pytest.raises(ValueError, match="does not hold cls.predictions.decoder.weight, a dense head"):
        inspection.inspect(tmp_path / "small")


def test_a_missing_tokenizer_stays_missing_and_a_damaged_one_is_named(source, text, tmp_path):
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: the one in .* cannot be loaded"):
        embkern.compress(source, **SVD)
    for path in source.glob("*token*"):
        path.unlink()
    report = embkern.compress(source, **SVD, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*"))
    assert report.table.worst_rows[0].token is None
    with pytest.raises(ValueError, match="text: expected a tokenizer with it"):
        embkern.compress(source, **SVD, text=text)


def test_a_damaged_report_is_named(tmp_path, source):
    embkern.compress(source, **SVD, output=tmp_path / "out")
    path = tmp_path / "out" / "embkern_report.json"
    whole = path.read_text()
    for content in ('{"rank": 5}', whole.replace('"rank": 5', '"rank": 4', 1), "[" * 10**5, "3"):
        path.write_text(content)
        with pytest.raises(ValueError, match="embkern_report.json is damaged"):
            read_report(tmp_path / "out")
    content = json.loads(whole)
    assert content.pop("checksum").startswith("crc32:")
    before = Report.model_validate(content)
    content["factors_bytes"] = content.pop("compressed_bytes")
    path.write_text(json.dumps(content))  # as older reports are: no checksum, and this name
    assert read_report(tmp_path / "out") == before
    assert read_report(source) is None
