"""Calibration on a model's own samples: the samples, the sums, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import numpy as np
import torch
import transformers as T
from torch.testing import assert_close

from embkern.models.calibrate import CalibrationTooLongError, on_samples, passes, self_calibrate, sums
from embkern.models.calibrate.objectives import LanguageModel, generator_of, shifted
from embkern.models.calibrate.on_text import run_of, weights_fingerprint
from embkern.models.calibrate.passes import run_pass
from embkern.models.calibrate.sampling import Beginning, beginning_of, resample_windows, sample_windows
from embkern.models.calibrate.windows import Windows, added_tokens
from embkern.models.find_table import find_table
from tests.example_models import MODELS, V, build
from tests.models.calibrating import sharp, stopping_after, tokenizer

WINDOWS, LENGTH, SEED = 3, 12, 5
FIRST = Beginning(1)


def sampled(model, beginning=FIRST, **options):
    settings = {"windows": WINDOWS, "length": LENGTH, "seed": SEED, "progress": False, **options}
    return torch.from_numpy(sample_windows(model, beginning, device=torch.device("cpu"), **settings))


def check_draws(ids, probabilities):
    """Check that tokens after the first are where the cumulative probabilities (N, T, V) pass their draws."""
    cumulative = probabilities.cumsum(-1)
    for number in range(WINDOWS):
        draws = torch.from_numpy(generator_of(SEED, number, 1).random(ids.shape[1]))
        for step in range(1, ids.shape[1]):
            row, token = cumulative[number, step - 1], int(ids[number, step])
            draw, least = float(draws[step] * row[-1]), float(row[token - 1]) if token else 0.0
            assert least - 1e-9 <= draw < float(row[token]) + 1e-9


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma3", "gpt-neox", "opt", "qwen3", "gemma2"])
def test_every_token_is_drawn_from_all_that_precede_it(name):
    model = sharp(name)
    ids = sampled(model)
    assert ids.shape == (WINDOWS, LENGTH)
    assert bool((ids[:, 0] == 1).all())
    with torch.no_grad():
        check_draws(ids, model(input_ids=ids).logits.softmax(-1))


@pytest.mark.parametrize("name", ["t5", "bart-scaled", "m2m100"])
def test_a_decoder_is_sampled_while_its_encoder_reads_an_empty_text(name):
    model, source = sharp(name), [5, 2]
    start = int(shifted(model, torch.zeros(1, 1, dtype=torch.int64))[0, 0])
    ids = sampled(model, Beginning(start, source))
    assert ids.shape == (WINDOWS, LENGTH)
    with torch.no_grad():
        read = torch.tensor([source]).expand(WINDOWS, -1)
        check_draws(ids, model(input_ids=read, decoder_input_ids=ids).logits.softmax(-1))


def test_what_an_encoder_decoder_begins_with():
    model, own = build("t5"), tokenizer()
    assert beginning_of(model, None) == Beginning(0, [model.config.eos_token_id])
    empty = own("")["input_ids"]
    assert beginning_of(model, own) == Beginning(0, empty or [model.config.eos_token_id])
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"expected eos_token_id below 101 .* got None; give text"):
        beginning_of(model, None)


def test_samples_depend_on_the_seed_and_the_number_alone():
    model = sharp("gpt2")
    ids = sampled(model)
    assert torch.equal(ids, sampled(model.train()))
    assert torch.equal(ids[:2], sampled(model, windows=2))
    assert torch.equal(ids[:, :5], sampled(model, length=5))
    assert not torch.equal(ids, sampled(model, seed=6))
    assert model.training


def test_samples_go_on_after_the_end_of_text():
    model = sharp("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1e3 * model.model.norm.weight  # or its negative
    ids = sampled(model, length=30)
    end = model.config.eos_token_id
    assert ((ids == end).sum(1) > 1).any(), "the end of text is drawn, and drawn again"


def test_a_model_without_a_cache_is_read_again_for_every_token(monkeypatch):
    model = sharp("gpt2")
    ids = sampled(model)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: forward(input_ids=input_ids))
    assert torch.equal(sampled(model), ids)


@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "gemma3"])
def test_the_sums_are_those_of_the_samples(name):
    model = sharp(name)
    found = self_calibrate(model, windows=WINDOWS, length=LENGTH, seed=SEED, progress=False)
    assert (found.tokens, found.scored) == (WINDOWS * LENGTH, WINDOWS * LENGTH)
    run = found.facts.runs[0]
    assert (found.facts.kind, found.facts.tokenizer, run.source) == ("causal", None, "samples")
    with torch.no_grad():
        probabilities = model(input_ids=sampled(model)).logits.softmax(-1).sum((0, 1))
    assert_close(found.predictions, probabilities, rtol=1e-9, atol=1e-12)
    expected = probabilities * (LENGTH - 1) / LENGTH
    expected[1] += WINDOWS
    assert_close(found.inputs, expected, rtol=1e-9, atol=1e-12)
    assert_close(float(found.inputs.sum()), float(found.tokens), rtol=1e-9, atol=0)
    again = self_calibrate(
        model, windows=WINDOWS, length=LENGTH, seed=SEED, progress=False, limit_seconds=None
    )
    assert torch.equal(again.input_moment, found.input_moment)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_the_moments_are_those_of_the_pass_over_the_samples(name):
    model = sharp(name)
    encodes = model.config.is_encoder_decoder
    ids = sampled(model, beginning_of(model, None), length=LENGTH + encodes)[:, int(encodes) :]
    read = Windows(list(ids.numpy()))
    found = self_calibrate(model, windows=WINDOWS, length=LENGTH, seed=SEED, progress=False)
    facts = found.facts.model_copy(
        update={"weights": weights_fingerprint(model), "runs": (run_of("text", read, SEED),)}
    )
    other = run_pass(model, find_table(model), read, LanguageModel(model, read, SEED), facts, progress=False)
    assert found.facts.runs[0].texts == read.fingerprint
    assert torch.equal(found.input_moment, other.input_moment)
    if encodes:
        assert torch.equal(found.inputs, other.inputs), "counts, of encoder and decoder"
        assert float(found.inputs.sum()) == 2 * WINDOWS * LENGTH
    assert torch.equal(found.head_moment, other.head_moment)


def test_the_first_token_is_the_models_or_the_tokenizers():
    def first(model, tokenizer=None):
        assert beginning_of(model, tokenizer).source is None
        return beginning_of(model, tokenizer).token

    model = build("gpt2")
    assert first(model) == model.config.bos_token_id == 1
    model.generation_config.bos_token_id = 7
    assert first(model) == 7
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    own = tokenizer()
    own.bos_token = "w3"
    assert first(model, own) == own.bos_token_id
    assert first(model) == model.config.eos_token_id == 2
    model.generation_config.eos_token_id = [9, 2]
    assert first(model) == 9
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(
        ValueError, match="expected bos_token_id or eos_token_id below 101 .* got None; give text"
    ):
        first(model)
    model.config.bos_token_id = V
    with pytest.raises(ValueError, match=f"got {V}; give text"):
        self_calibrate(model)


def resampled(model, **options):
    settings = {"windows": WINDOWS, "length": LENGTH, "seed": SEED, "progress": False, **options}
    made = resample_windows(model, tokenizer(), device=torch.device("cpu"), **settings)
    return torch.from_numpy(np.stack(made.ids)), made


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_masked_model_fills_in_what_it_predicts(rounds):
    model, own = build("bert").double().train(), tokenizer()  # the size of a batch changes the last bits
    with torch.no_grad():
        model.cls.predictions.bias[:] = -100
        model.cls.predictions.bias[10:20] = 100
    before, after = added_tokens(own)
    ids, made = resampled(model, windows=20, length=40, rounds=rounds)
    assert ids.shape == (20, 40)
    assert (made.first, made.last) == (len(before), len(after))
    inner = ids[:, len(before) : 40 - len(after)]
    assert set(inner.unique().tolist()) == set(range(10, 20)), "each of ten likely tokens, and no mask"
    assert ids[:, : len(before)].tolist() == [before] * 20
    assert model.training
    assert torch.equal(ids, resampled(model, windows=20, length=40, rounds=rounds)[0])
    assert torch.equal(ids[:2], resampled(model, windows=2, length=40, rounds=rounds)[0])
    assert not torch.equal(ids, resampled(model, windows=20, length=40, rounds=rounds, seed=6)[0])


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_the_sums_of_a_masked_model_are_those_of_its_samples(name):
    model, own = sharp(name), tokenizer()
    found = self_calibrate(model, windows=WINDOWS, length=LENGTH, seed=SEED, tokenizer=own, progress=False)
    _, read = resampled(model)
    assert (found.facts.kind, found.facts.runs[0].source) == ("masked", "samples")
    assert found.facts.runs[0].texts == read.fingerprint
    facts = found.facts.model_copy(update={"runs": (run_of("text", read, SEED),)})
    objective = LanguageModel(model, read, SEED, own.mask_token_id)
    other = run_pass(model, find_table(model), read, objective, facts, progress=False)
    assert torch.equal(found.input_moment, other.input_moment)
    assert torch.equal(found.inputs, other.inputs)


def test_a_masked_model_needs_a_tokenizer_with_a_mask():
    with pytest.raises(ValueError, match="tokenizer: expected the masked language model's, .* got None"):
        self_calibrate(build("bert"))
    own = tokenizer()
    own.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: expected a mask token"):
        self_calibrate(build("bert"), tokenizer=own)


def test_a_masked_model_that_returns_nan_is_refused():
    model = build("bert")
    with torch.no_grad():
        model.cls.predictions.bias[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in the output of BertForMaskedLM in window 0"):
        self_calibrate(model, tokenizer=tokenizer(), windows=2, length=9, progress=False)


def test_a_masked_model_that_would_take_too_long():
    with pytest.raises(CalibrationTooLongError):
        self_calibrate(build("bert"), tokenizer=tokenizer(), limit_seconds=1e-9, progress=False)


def test_a_sentence_encoder_is_refused():
    with pytest.raises(ValueError, match="calibrate: expected a language model to sample from, .* give text"):
        self_calibrate(build("bert-backbone"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "windows: expected at least 1, got 0"),
        ({"length": 1}, "length: expected at least 2, got 1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        self_calibrate(build("gpt2"), **options)


def test_a_model_that_returns_nan_is_refused():
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in the output of GPT2LMHeadModel in window 0"):
        self_calibrate(model)


@pytest.mark.parametrize(("stop_in", "length"), [("sample", 30), ("pass", 6)])
def test_what_would_take_too_long_is_told_and_not_done(stop_in, length):
    model = build("gpt2").train()
    with pytest.raises(CalibrationTooLongError, match=r"got an estimate of .*limit_seconds=None") as caught:
        self_calibrate(model, windows=2, length=length, limit_seconds=1e-9, progress=False)
    assert caught.value.seconds > caught.value.limit == 1e-9
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    self_calibrate(model, windows=2, length=length, limit_seconds=None, progress=False)


def test_a_long_estimate_is_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(on_samples, "_TOLD_FROM", 0.0)
    for progress, lines in ((None, 1), (True, 1), (False, 0)):
        self_calibrate(build("gpt2"), windows=2, length=20, progress=progress)
        assert capsys.readouterr().err.count("calibrating on the model's own samples takes about") == lines
    monkeypatch.setattr(on_samples, "_TOLD_FROM", float("inf"))
    self_calibrate(build("gpt2"), windows=2, length=20)
    assert "takes about" not in capsys.readouterr().err, "a short one is not worth a line"


class StoppedError(Exception):
    pass


def test_an_interrupted_pass_over_samples_is_resumed(monkeypatch, tmp_path):
    monkeypatch.setattr(passes, "LOGIT_BYTES", 1)
    monkeypatch.setattr(sums, "SAVED_EVERY", 0.0)
    model, options = build("gpt2"), {"windows": 5, "length": 9, "progress": False}
    whole = self_calibrate(model, **options)
    with stopping_after(monkeypatch, 3, StoppedError), pytest.raises(StoppedError):
        self_calibrate(model, **options, checkpoint=tmp_path / "c")
    assert (tmp_path / "c").exists()
    resumed = self_calibrate(model, **options, checkpoint=tmp_path / "c")
    for name in ("inputs", "input_moment", "predictions", "head_moment"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert not list(tmp_path.iterdir())


def test_samples_are_cut_to_what_the_model_reads():
    model = build("gpt2")
    found = self_calibrate(model, windows=1, length=500, progress=False)
    assert found.tokens == model.config.n_positions == 64


def test_a_narrow_model_in_inference_mode():
    model = build("llama-tied").bfloat16()
    with torch.inference_mode():
        found = self_calibrate(model, windows=2, length=9, progress=False)
    assert torch.isfinite(found.input_moment).all()
    assert not found.inputs.is_inference()


def test_every_causal_model_of_the_tests():
    for name in ("gpt2", "llama-tied", "gpt-neox", "qwen3", "gemma3", "opt"):
        model: T.PreTrainedModel = MODELS[name]()
        found = self_calibrate(model, windows=2, length=6, progress=False)
        assert_close(float(found.predictions.sum()), 12.0, rtol=1e-5, atol=0)
