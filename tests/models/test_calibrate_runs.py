"""Runs of calibration: what they leave alone, what they refuse, and how they are resumed."""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("transformers")
import torch
import transformers as T
from torch.testing import assert_close

from embkern.methods.calibration import Calibration
from embkern.models.calibrate import calibrate, check_calibration, passes, sums
from embkern.models.find_table import UnsupportedModelError
from tests.example_models import MODELS, build
from tests.models.calibrating import CLASSIFIERS, H, V, distinct_words, sharp, tokenizer

TEXTS = [distinct_words(seed) for seed in range(3)]


def run(model, texts=TEXTS, **options):
    return calibrate(model, tokenizer(), texts, **{"tokens": 200, "length": 20, "progress": False, **options})


def assert_same(one: Calibration, other: Calibration):
    for name in ("inputs", "input_moment", "predictions", "head_moment"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert (one.scored, one.facts) == (other.scored, other.facts)


# ---- the model stays as it was ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "bert-backbone", "gpt2", "t5", "gemma3", "token"])
def test_the_model_is_as_before(name):
    model = {**MODELS, **CLASSIFIERS}[name]().train()
    kinds = list(model.modules())
    kinds[-1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cache, state = getattr(model.config, "use_cache", None), torch.get_rng_state()

    def check():
        assert [module.training for module in kinds] == [True] * (len(kinds) - 1) + [False]
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in kinds)
        assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
        assert [p.grad is None for p in parameters] == [True, False] + [True] * (len(parameters) - 2)
        assert bool((parameters[1].grad == 1).all())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert getattr(model.config, "use_cache", None) == cache
        assert torch.equal(torch.get_rng_state(), state)

    first, second = run(model), run(model)
    check()
    assert_same(first, second)
    with torch.no_grad(), torch.inference_mode():
        assert_same(first, run(model))
    assert_same(first, run(model.requires_grad_(False).eval()))


def test_a_failed_run_leaves_the_model_as_before():
    model = MODELS["gpt2"]().train()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("progress", [None, False, True])
def test_a_progress_bar_is_shown_on_a_terminal_or_on_request(capsys, progress):
    run(build("gpt2"), progress=progress)
    printed, shown = capsys.readouterr()
    assert (printed, "calibrate" in shown) == ("", bool(progress))


# ---- dtypes, scales, sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "bert", "t5", "bert-backbone"])
def test_narrow_dtypes(name, dtype):
    model = sharp(name, 4.0)
    narrow = copy.deepcopy(model).to(dtype)
    # The same weights in float64, so that only the arithmetic of the pass is narrow.
    exact, got = run(copy.deepcopy(narrow).double()), run(narrow)
    assert got.input_moment.dtype == torch.float64
    assert torch.equal(got.inputs, exact.inputs)
    assert got.facts.weights == exact.facts.weights
    # A label may be another one by a rounding of its probability, so that only the head's sums are compared.
    eps = torch.finfo(dtype).eps
    if exact.head_moment is not None:
        assert_close(
            got.head_moment,
            exact.head_moment,
            rtol=64 * eps,
            atol=64 * eps * float(exact.head_moment.trace()),
        )
        assert_close(got.predictions.sum(), exact.predictions.sum(), rtol=1e-5, atol=0)
    assert torch.isfinite(got.input_moment).all()


def test_a_scaled_lookup_counts_by_the_row():
    """A table divided by c, with a scale times c, is the same function, and its errors count c^2 times."""
    c = 4.0  # a power of two, so that nothing is rounded
    model = sharp("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = run(model)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.div_(c)
        embedding.embed_scale.mul_(c)
        embedding.scalar_embed_scale *= c
    after = run(model)
    assert_close(after.input_moment, before.input_moment * c**2, rtol=1e-9, atol=0)
    assert_close(after.head_moment, before.head_moment, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=V, n_embd=33, n_layer=1, n_head=3, n_positions=64)),
        lambda: T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=V, n_embd=128, n_layer=1, n_head=2, n_positions=64)
        ),
    ],
    ids=["odd H", "V < H"],
)
def test_odd_widths_and_fewer_rows_than_columns(make):
    model = make()
    found = run(model)
    width = model.config.n_embd
    assert found.input_moment.shape == found.head_moment.shape == (width, width)
    assert_close(float(found.predictions.sum()), 200.0, rtol=1e-5, atol=0)


def test_dead_dimensions_and_frozen_layers_make_singular_moments():
    model = build("llama-untied").requires_grad_(False)
    with torch.no_grad():
        model.model.norm.weight[:5] = 0
        for layer in model.model.layers:
            layer.input_layernorm.weight[:7] = 0
            layer.post_attention_layernorm.weight[:7] = 0
    found = run(model)
    assert not found.head_moment[:5].any()
    assert torch.linalg.matrix_rank(found.head_moment) == H - 5
    constant = sharp("llama-untied")
    with torch.no_grad():
        constant.lm_head.weight.zero_()
    assert not run(constant).input_moment.any(), "a constant output depends on no row"


def test_a_head_of_another_shape_is_not_measured():
    model = build("llama-untied")
    model.lm_head = torch.nn.Linear(H, V - 4, bias=False)
    found = run(model)
    assert found.predictions is found.head_moment is None
    assert found.scored == 200


def test_long_windows_are_cut_to_what_the_model_reads():
    found = run(build("gpt2"), length=500)
    assert found.facts.runs[0].length == 50  # of 64 positions: four windows of 200 tokens
    assert run(build("roberta"), tokens=1000, length=500).facts.runs[0].length <= 64 - 1


def test_a_model_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    build("gpt2").save_pretrained(tmp_path)
    mapped = T.GPT2LMHeadModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert_same(run(mapped), run(T.GPT2LMHeadModel.from_pretrained(tmp_path)))
    mapped.hf_device_map = {"transformer": "cpu", "lm_head": 0}
    with pytest.raises(UnsupportedModelError, match="device_map: the model is spread over several devices"):
        run(mapped)


def test_the_pooling_beside_a_sentence_encoder_is_read(tmp_path):
    build("bert-backbone").save_pretrained(tmp_path)
    loaded = T.BertModel.from_pretrained(tmp_path)
    assert run(loaded).facts.runs[0].pooling == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert run(loaded).facts.runs[0].pooling == "cls"
    assert_same(run(loaded), run(loaded, pooling="cls"))
    assert run(T.BertForMaskedLM.from_pretrained(tmp_path)).facts.kind == "masked"


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_sentence_transformer_is_calibrated_as_its_encoder(mode, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    encoder = build("bert-backbone")
    encoder.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pooling = modules.Pooling(encoder.config.hidden_size, pooling_mode=mode)
    model = library.SentenceTransformer(modules=[modules.Transformer(str(tmp_path)), pooling])
    found = run(model)
    assert (found.facts.kind, found.facts.runs[0].pooling) == ("sentence", mode)
    assert_same(found, run(encoder, pooling=mode))


def test_a_sentence_encoder_is_the_same_model_with_and_without_its_head(tmp_path):
    masked = build("bert")
    found = run(masked, pooling="mean")
    masked.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_calibration(found, masked)
        check_calibration(found, T.BertModel.from_pretrained(tmp_path))  # with a pooler, which masked lacks
    with pytest.raises(ValueError, match="architecture BertModel instead of GPT2Model"):
        check_calibration(found, build("gpt2"))


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "texts: expected at least 2 tokens"),
        ({"texts": ["w1"]}, "texts: expected at least 2 tokens to calibrate on, got 1"),
        ({"tokens": 0}, "tokens: expected at least 1, got 0"),
        ({"length": 1}, "length: expected at least 2, got 1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(build("gpt2"), **options)


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    small = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="tokenizer: expected ids below the table's 50 rows"):
        run(small)
    with pytest.raises(ValueError, match="model: expected a head on an encoder-decoder, got T5Model"):
        run(T.T5Model(T.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)))
    with pytest.raises(ValueError, match="pooling: expected an encoder or a decoder, got T5"):
        run(build("t5"), pooling="mean")
    unmasked = tokenizer()
    unmasked.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: expected a mask token"):
        calibrate(build("bert"), unmasked, TEXTS)
    with pytest.raises(UnsupportedModelError, match="expected a transformers PreTrainedModel"):
        run(torch.nn.Linear(3, 4))
    for wrong, got in ((None, "NoneType"), ("gpt2", "str")):
        with pytest.raises(TypeError, match=f"tokenizer: expected that of the model, got {got}"):
            calibrate(build("gpt2"), wrong, TEXTS)


@pytest.mark.parametrize("name", ["gpt2", "bert-backbone", "sequence"])
def test_a_model_that_returns_nan_is_refused_by_window_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SAVED_EVERY", 0.0)
    model = {**MODELS, **CLASSIFIERS}[name]().eval()
    texts = ["w1 w2 w3"] * 4 + ["w1 w9 w3"] + ["w1 w2 w3"] * 5
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer()("w9")["input_ids"][0], 0] = torch.nan
        if (head := model.get_output_embeddings()) is not None:
            head.weight = torch.nn.Parameter(head.weight.detach().nan_to_num())
    with pytest.raises(
        ValueError, match=f"NaN or infinity in the output of {type(model).__name__} in window 4"
    ):
        run(model, texts, tokens=30, length=3, checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_gradients_that_overflow_are_refused():
    model = build("llama-untied").half()
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
        model.get_input_embeddings().weight.mul_(1e-3)
    with pytest.raises(
        ValueError, match=r"NaN or infinity in the (gradient|output) .* use bfloat16 or float32"
    ):
        run(model)


# ---- batches and checkpoints -----------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batches(monkeypatch):
    model = sharp("gpt2")
    together = run(model)
    monkeypatch.setattr(passes, "LOGIT_BYTES", 1)
    alone = run(model)
    for name in ("inputs", "input_moment", "predictions", "head_moment"):
        assert_close(getattr(alone, name), getattr(together, name), rtol=1e-9, atol=1e-9)
    assert not torch.equal(run(model, seed=1).input_moment, alone.input_moment)


class StoppedError(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """Interrupt runs after some batches, with a checkpoint after each."""
    monkeypatch.setattr(passes, "LOGIT_BYTES", 1)
    monkeypatch.setattr(passes, "BATCH_TOKENS", 1)
    monkeypatch.setattr(sums, "SAVED_EVERY", 0.0)

    def interrupt(model, after, **options):
        class Stopping(sums.Checkpoint):
            def save_if_due(self, found):
                if found.batches == after:
                    raise StoppedError
                super().save_if_due(found)

        with monkeypatch.context() as patch:
            patch.setattr(passes, "Checkpoint", Stopping)
            with pytest.raises(StoppedError):
                run(model, checkpoint=tmp_path / "c", **options)

    return interrupt


@pytest.mark.parametrize("name", ["gpt2", "bert", "bert-backbone"])
def test_a_resumed_run_equals_an_uninterrupted_one(interrupted, name, tmp_path):
    model = build(name)
    whole = run(model)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    interrupted(model, 2)
    interrupted(model, 3)
    assert len(forwards) == 2 + 2
    assert_same(run(model, checkpoint=tmp_path / "c"), whole)
    assert len(forwards) == 4 + len(whole.facts.runs) * _batches(whole) - 2
    handle.remove()
    assert not list(tmp_path.iterdir()), "a complete run removes its checkpoint"


def _batches(found):
    return found.scored if found.predictions is None else 10


@pytest.mark.parametrize(
    ("options", "different"),
    [({"seed": 1}, "seed"), ({"texts": TEXTS[:2]}, "texts.*"), ({"model": "other"}, "weights")],
)
def test_the_checkpoint_of_another_run_is_refused(interrupted, options, different, tmp_path):
    model = build("gpt2")
    interrupted(model, 3)
    other = copy.deepcopy(model)
    if options.pop("model", None):
        with torch.no_grad():
            other.transformer.ln_f.weight.mul_(1.5)
    with pytest.raises(ValueError, match=f"belongs to another run .different {different}.; delete it"):
        run(other, checkpoint=tmp_path / "c", **options)
    (tmp_path / "c").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="checkpoint: .* delete it to start anew"):
        run(model, checkpoint=tmp_path / "c")


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file in a directory that exists"):
        run(build("gpt2"), checkpoint=tmp_path / "none" / "c")


# ---- calibrations and their models -----------------------------------------------------------------------


def test_a_calibration_knows_its_model():
    model = build("gpt2")
    found = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_calibration(found, model, tokenizer())
        check_calibration(found, copy.deepcopy(model).eval())
    with pytest.raises(ValueError, match="architecture GPT2LMHeadModel instead of OPTForCausalLM"):
        check_calibration(found, build("opt"))
    other = tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="calibration: expected one of this model, .* tokenizer"):
        check_calibration(found, model, other)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 3] += 1.0
    with pytest.warns(UserWarning, match="weights have changed"):
        check_calibration(found, model)
    with pytest.raises(ValueError, match="weights"):
        found + run(model)


def test_calibrations_add_up():
    model = build("gpt2")
    one, other = run(model), run(model, seed=1)
    total = one + other
    assert (total.scored, total.tokens) == (400, 400)
    with pytest.raises(ValueError, match="got twice one over 200 tokens of text with seed 0"):
        total + run(model)
    assert torch.equal(total.input_moment, one.input_moment + other.input_moment)
