"""Calibrations: sums, checks against a model, round trips through files, and refusal of invalid ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embkern.methods.calibration import Calibration, CalibrationFacts, CalibrationRun

DATA = Path(__file__).parents[1] / "data"
V, H = 11, 3
OTHER = CalibrationRun(source="text", texts="sha256:1", tokens=40, length=8, seed=0)
RUN = CalibrationRun(source="text", texts="sha256:0", tokens=40, length=8, seed=0)
FACTS = CalibrationFacts(
    architecture="GPT2LMHeadModel", kind="causal", weights="sha256:1", tokenizer="sha256:2", runs=(RUN,)
)


def moment(n=5):
    rows = torch.randn(n, H, dtype=torch.float64)
    return rows.t() @ rows


def calibration(**fields):
    return Calibration(
        **{
            "inputs": torch.arange(V).double(),
            "input_moment": moment(),
            "scored": 40,
            "predictions": torch.rand(V).double(),
            "head_moment": moment(),
            "facts": FACTS,
            **fields,
        }
    )


def facts(**fields):
    return CalibrationFacts(**{**FACTS.model_dump(), **fields})


def fields_of(value):
    return [value.inputs, value.input_moment, value.predictions, value.head_moment]


HEADLESS = {"predictions": None, "head_moment": None}


def test_calibrations_of_one_model_add_up():
    one, other = calibration(), calibration(facts=facts(tokenizer=None, layers=2, runs=(OTHER,)))
    total = one + other
    for got, *parts in zip(fields_of(total), fields_of(one), fields_of(other), strict=True):
        assert torch.equal(got, parts[0] + parts[1])
    assert (total.scored, total.tokens) == (80, 80)
    assert total.facts == facts(layers=2, runs=(RUN, OTHER))
    assert (other + one).facts == facts(layers=2, runs=(OTHER, RUN))
    assert torch.equal(sum([one, other]).input_moment, total.input_moment)
    with pytest.raises(TypeError):
        1 + one
    headless = calibration(**HEADLESS) + calibration(**HEADLESS, facts=facts(runs=(OTHER,)))
    assert headless.predictions is headless.head_moment is None


def test_a_pass_counts_once():
    with pytest.raises(ValueError, match="got twice one over 40 tokens of text with seed 0"):
        calibration() + calibration(facts=facts(runs=(OTHER, RUN)))


def test_samples_of_the_model_are_no_text():
    samples = RUN.model_copy(update={"source": "samples"})
    assert calibration().on_text
    assert not calibration(facts=facts(runs=(samples,))).on_text
    assert not calibration(facts=facts(runs=(RUN, samples))).on_text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"facts": facts(architecture="OPTForCausalLM")}, "OPTForCausalLM instead of GPT2LMHeadModel"),
        ({"facts": facts(tokenizer="sha256:3")}, "tokenizer sha256:3 instead of sha256:2"),
        ({"facts": facts(weights="sha256:4")}, "weights sha256:4 instead of sha256:1"),
        ({"inputs": torch.ones(V + 1).double(), **HEADLESS}, "table 12 x 3 instead of 11 x 3"),
        (HEADLESS, "with an output head or two without"),
    ],
)
def test_calibrations_of_different_models_do_not_add_up(fields, message):
    with pytest.raises(ValueError, match=f"calibration: expected two .*{message}"):
        calibration() + calibration(**fields)


@pytest.mark.parametrize("fields", [{}, HEADLESS], ids=["with a head", "without a head"])
def test_summary(fields):
    summary = calibration(**fields, input_moment=torch.diag(torch.tensor([3.0, 1, 0]).double())).summary()
    assert (summary.tokens, summary.scored, summary.distinct) == (40, 40, V - 1)
    assert abs(summary.input_share - 0.75) < 1e-12
    assert (summary.head_share is None) == bool(fields)
    rows = summary.rows()
    assert rows["tokens"] == "40 (text)"
    assert ("output head, first direction" in rows) != bool(fields)
    assert calibration(input_moment=torch.zeros(H, H).double()).summary().input_share == 0


def check(**fields):
    model = {"architecture": "GPT2LMHeadModel", "num_embeddings": V, "embedding_dim": H}
    known = {"layers": 2, "tokenizer": "sha256:2", "weights": "sha256:1"}
    calibration(facts=facts(layers=2)).check_model(**{**model, **known, **fields})


def test_the_calibration_of_a_model_is_accepted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()
        check(tokenizer=None, weights=None)
        check(layers=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "BertForMaskedLM"}, "architecture GPT2LMHeadModel instead of BertForMaskedLM"),
        ({"num_embeddings": 12}, "table 11 x 3 instead of 12 x 3"),
        ({"embedding_dim": 4}, "table 11 x 3 instead of 11 x 4"),
        ({"layers": 4}, "layers 2 instead of 4"),
        ({"tokenizer": "sha256:5"}, "tokenizer sha256:2 instead of sha256:5"),
    ],
)
def test_the_calibration_of_another_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"calibration: expected one of this model, .*{message}"):
        check(**fields)


def test_a_model_that_was_changed_since_is_warned_of():
    with pytest.warns(UserWarning, match="weights have changed since it was calibrated"):
        check(weights="sha256:6")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"inputs": torch.ones(V)}, TypeError, "inputs: expected float64, got torch.float32"),
        ({"inputs": torch.ones(0).double()}, ValueError, r"inputs: expected shape \(V,\) with V >= 1"),
        ({"inputs": torch.zeros(V).double()}, ValueError, "inputs: expected values of at least 0 with one"),
        ({"inputs": torch.full((V,), -1.0).double()}, ValueError, "inputs: expected values of at least 0"),
        ({"inputs": torch.full((V,), torch.nan).double()}, ValueError, "inputs: expected finite values"),
        ({"input_moment": torch.ones(H).double()}, ValueError, r"input_moment: expected shape \(H, H\)"),
        ({"input_moment": torch.ones(H, 2).double()}, ValueError, r"expected shape \(3, 3\), got \(3, 2\)"),
        ({"head_moment": torch.ones(4, 4).double()}, ValueError, r"head_moment: .* got \(4, 4\)"),
        ({"head_moment": torch.ones(H, H).tril().double()}, ValueError, "expected a sum of outer products"),
        (
            {"head_moment": -torch.eye(H).double()},
            ValueError,
            "head_moment: expected a sum",
        ),
        ({"predictions": torch.ones(V + 1).double()}, ValueError, r"predictions: expected shape \(11,\)"),
        ({"predictions": None}, ValueError, "predictions, head_moment: expected both or neither"),
        ({"scored": 0}, ValueError, "scored: expected an integer of at least 1, got 0"),
        ({"scored": True}, ValueError, "scored: expected an integer of at least 1, got True"),
    ],
)
def test_invalid_calibrations_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        calibration(**fields)


@pytest.mark.parametrize("fields", [{}, HEADLESS], ids=["with a head", "without a head"])
def test_round_trip(tmp_path, fields):
    saved = calibration(**fields)
    saved.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    for got, expected in zip(fields_of(loaded), fields_of(saved), strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert (loaded.scored, loaded.facts) == (saved.scored, saved.facts)
    before = (tmp_path / "c").read_bytes()
    loaded.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "no temporary file stays"


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "c"
    calibration().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file of a calibration, found none"):
        Calibration.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "expected format 'embkern.calibration/1', got None"),
        (lambda t, m: m.update(facts="{"), "metadata is damaged"),
        (lambda t, m: m.update(facts='{"kind": "causal"}'), "architecture"),
        (lambda t, m: m.update(facts=m["facts"].replace('"tokens": 40', '"tokens": 0')), "tokens"),
        (lambda t, m: m.update(scored="41"), "scored was changed"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "expected inputs, input_moment and optionally"),
        (lambda t, m: t.update(inputs=t["inputs"] + 1), "inputs was changed"),
    ],
)
def test_edited_files_are_refused(tmp_path, change, message):
    path = tmp_path / "c"
    calibration().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("header", None)  # its checksum would fail first
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


def test_a_file_written_before_holds_what_it_held():
    """``tests/data/calibration-1.safetensors``, which every later version reads."""
    found = Calibration.load(DATA / "calibration-1.safetensors")
    assert torch.equal(found.inputs, torch.arange(6).double())
    assert torch.equal(found.input_moment, torch.tensor([[5.0, 2], [2, 1]]).double())
    assert torch.equal(found.predictions, torch.arange(6).double() / 2)
    assert torch.equal(found.head_moment, torch.tensor([[2.0, -1], [-1, 4]]).double())
    assert (found.scored, found.facts) == (
        15,
        facts(runs=(RUN, RUN.model_copy(update={"source": "samples"}))),
    )
