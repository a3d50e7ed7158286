"""Which calibration a compression uses, in ``compress``, a recipe, ``EmbkernConfig`` and the command line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

T = pytest.importorskip("transformers")

import embkern
from embkern import EmbkernConfig, Recipe
from embkern.cli import main as cli
from embkern.methods import allocate
from embkern.methods.metric_allocation import PREDICTION_STRENGTH, input_frequencies
from embkern.models.calibrate import CalibrationTooLongError, calibrate, choice, self_calibrate
from embkern.models.calibrate.on_samples import self_calibrate_holding_out
from embkern.models.checkpoint import stored_table, stored_tables
from embkern.models.plan import NOT_CALIBRATED
from embkern.text.counts import count_tokens
from embkern.text.frequencies import frequencies_of
from embkern.text.prior import vocabulary_prior
from tests.example_models import MODELS
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.models.calibrating import CAPPED, distinct_words, sharp, tokenizer

pytestmark = pytest.mark.usefixtures("quantizing")
PACKED = {"method": "allocate", "ratio": 2}


def build(name: str):
    torch.manual_seed(1)
    return MODELS[name]().eval()


def same(table, other) -> bool:
    tensors = other.tensors()
    return all(torch.equal(each, tensors[name]) for name, each in table.tensors().items())


@pytest.fixture
def own_calibration():
    """Samples are short here, as the tests need no accuracy."""
    found, _ = self_calibrate_holding_out(build("gpt2"), choice.HELD_OUT_SAMPLES, windows=2, length=16)
    return found


@pytest.fixture
def few_samples(monkeypatch):
    def short(model, held_out, **options):
        return self_calibrate_holding_out(model, held_out, **{"windows": 2, "length": 16, **options})

    monkeypatch.setattr(choice, "self_calibrate_holding_out", short)


@pytest.mark.usefixtures("few_samples")
def test_a_causal_model_is_calibrated_on_its_own_samples(own_calibration):
    model = build("gpt2")
    weight = model.get_input_embeddings().weight.detach().clone()
    report = embkern.compress(model, **PACKED)
    assert report.calibration == "32 tokens of the model's own samples"
    assert report.counts == "those of the calibration"
    assert report.predicted_kl > 0
    assert report.divergence.tokens == choice.HELD_OUT_SAMPLES * 15  # The last of 16 predicts none.
    assert report.divergence.mean > 0
    assert {"KL divergence, predicted", "KL divergence, measured"} <= set(report.rows())
    counts = input_frequencies(own_calibration)
    expected = allocate(weight, ratio=2, counts=counts, calibration=own_calibration)
    assert same(stored_table(model), expected)


@pytest.mark.usefixtures("few_samples")
def test_a_masked_model_is_calibrated_on_its_own_samples_on_request():
    report = embkern.compress(build("bert"), **PACKED, calibrate=True, tokenizer=tokenizer())
    assert report.calibration == "32 tokens of the model's own samples"
    assert report.predicted_kl > 0
    assert report.divergence.mean > 0


@pytest.mark.usefixtures("few_samples")
def test_an_encoder_decoder_is_calibrated_on_its_own_samples_on_request():
    report = embkern.compress(build("t5"), **PACKED, calibrate=True)
    assert report.calibration == "32 tokens of the model's own samples"
    assert report.predicted_kl > 0
    assert report.divergence is None, "nothing is held out"


@pytest.mark.parametrize(("name", "recipe"), [("gpt2", {"calibrate": False}), ("bert", {}), ("t5", {})])
def test_others_are_not_unless_asked(name, recipe, monkeypatch):
    monkeypatch.setattr(choice, "self_calibrate_holding_out", None)
    model = build(name)
    weight = model.get_input_embeddings().weight.detach().clone()
    counts = torch.arange(len(weight), 0, -1).double()
    report = embkern.compress(model, **PACKED, **recipe, counts=counts)
    assert report.calibration.startswith("none")
    assert report.predicted_kl is None
    assert same(stored_table(model), allocate(weight, ratio=2, counts=counts))


def test_text_and_files(tmp_path):
    text, words = tmp_path / "text.txt", tokenizer()
    text.write_text(distinct_words())
    found = calibrate(build("bert"), words, [distinct_words()])
    found.save(tmp_path / "calibration.safetensors")
    tables = []
    for given in (
        {"calibrate_text": text},
        {"calibrate_text": [text]},
        {"calibration": found},
        {"calibration": tmp_path / "calibration.safetensors"},
    ):
        model = build("bert")
        report = embkern.compress(model, **PACKED, **given, tokenizer=words)
        assert report.calibration == f"{found.tokens:,} tokens of text"
        tables.append(stored_table(model))
    assert all(same(table, tables[0]) for table in tables)


def test_a_file_in_a_recipe_or_a_config_serves_and_is_not_saved(own_calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    own_calibration.save(path)
    build("gpt2").save_pretrained(tmp_path / "dense")
    given = build("gpt2")
    embkern.compress(given, **PACKED, calibration=path)
    (tmp_path / "recipe.yaml").write_text(f"ratio: 2\ncalibration: {path}\n")
    named = build("gpt2")
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    report = embkern.compress(named, recipe=recipe)
    assert report.calibration == "32 tokens of the model's own samples"
    assert "calibration" not in report.recipe.model_dump()
    config = EmbkernConfig(**PACKED, calibration=path)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "small")
    assert str(path) not in (tmp_path / "small" / "config.json").read_text()
    path.unlink()
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for model in (named, loaded, again):
        assert same(stored_table(model), stored_table(given))
    with pytest.raises(FileNotFoundError, match="calibration: expected a file of a calibration, found none"):
        T.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=EmbkernConfig(**PACKED, calibration=path)
        )
    # Arguments and flags replace the recipe's.
    embkern.compress(build("gpt2"), recipe=recipe, calibration=own_calibration)
    (tmp_path / "text.txt").write_text(distinct_words())
    text = {"calibrate_text": tmp_path / "text.txt", "tokenizer": tokenizer()}
    assert embkern.compress(build("gpt2"), recipe=recipe, **text).calibration.endswith("tokens of text")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml", calibrate=False).calibration is None
    (tmp_path / "other.yaml").write_text("ratio: 2\ncalibrate: false\n")
    assert Recipe.from_yaml(tmp_path / "other.yaml", calibration="x").calibrate is None
    with pytest.raises(ValueError, match="calibration: expected none: none, as it measures the input table"):
        T.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=EmbkernConfig(ratio=2, tables=["wpe"], calibration=path)
        )


def test_a_head_that_predicts_the_same_whatever_is_read(few_samples, caplog, tmp_path):
    model = build("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    weight = model.get_input_embeddings().weight.detach().clone()
    report = embkern.compress(model, **PACKED)
    message = "none (the model's outputs do not depend on its embedding)"
    assert report.calibration == message
    assert f"calibration: {message}" in caplog.text
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=EmbkernConfig(**PACKED))
    expected = allocate(weight, ratio=2, counts=vocabulary_prior(None, len(weight)))
    assert same(stored_table(loaded), expected)
    assert same(stored_table(model), expected)
    with pytest.raises(ValueError, match="calibration: expected gradients or hidden states other than zero"):
        embkern.compress(T.AutoModelForCausalLM.from_pretrained(tmp_path), **PACKED, calibrate=True)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_model_with_a_head_in_a_sentence_transformers_folder_is_a_sentence_encoder(
    name, monkeypatch, tmp_path
):
    monkeypatch.setattr(choice, "self_calibrate_holding_out", None)
    words, text = tokenizer(), tmp_path / "text.txt"
    text.write_text("\n".join(distinct_words(seed) for seed in range(3)))
    build(name).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    embkern.api.calibrate_files(tmp_path, [text], tmp_path / "calibration", progress=False)
    assert embkern.Calibration.load(tmp_path / "calibration").facts.kind == "sentence"
    tables = []
    for given in ({"calibrate_text": text}, {"calibration": tmp_path / "calibration"}):
        report = embkern.compress(str(tmp_path), **PACKED, **given)
        assert report.divergence is None
        tables.append(stored_table(report.model))
    assert same(*tables)
    report = embkern.compress(str(tmp_path), **PACKED)
    assert report.calibration == "none; text (--calibrate-text) would lower the error that the model sees"
    # Only text has to be pooled.
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    for given in ({}, {"calibrate": False}, {"method": "svd"}):
        embkern.compress(str(tmp_path), **{**PACKED, **given})
    config = EmbkernConfig(**PACKED)
    T.AutoModel.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="pooling: expected mean or cls .* got 'lasttoken'"):
        embkern.compress(str(tmp_path), **PACKED, calibrate_text=text)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_a_sentence_transformer_pools_as_its_modules_do(mode, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    (tmp_path / "text.txt").write_text("\n".join(distinct_words(seed) for seed in range(3)))
    encoder = build("bert-backbone")
    encoder.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)

    def model():
        pooling = modules.Pooling(encoder.config.hidden_size, pooling_mode=mode)
        return library.SentenceTransformer(modules=[modules.Transformer(str(tmp_path)), pooling])

    embkern.compress(model(), **PACKED)  # nothing is pooled
    options = {**PACKED, "calibrate_text": tmp_path / "text.txt"}
    if mode == "max":
        with pytest.raises(ValueError, match="pooling: expected mean or cls .* got 'max'"):
            embkern.compress(model(), **options)
        return
    found = embkern.compress(model(), **options).model
    calibration = calibrate(encoder, tokenizer(), embkern.read_texts(options["calibrate_text"]), pooling=mode)
    plain = embkern.compress(encoder, **PACKED, calibration=calibration, tokenizer=tokenizer()).model
    assert same(stored_table(found[0].auto_model), stored_table(plain))


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("name", list(CAPPED))
def test_scaled_and_capped_logits(name):
    model = sharp(name).float()
    report = embkern.compress(model, **PACKED, progress=False)
    assert report.calibration == "32 tokens of the model's own samples"
    assert 0 < report.predicted_kl < float("inf")
    assert 0 < report.divergence.mean < float("inf")


def test_classes_of_rare_tokens_share_the_prior_with_a_calibration(own_calibration):
    words, weight = tokenizer(), build("gpt2").get_input_embeddings().weight.detach()
    V = len(weight)
    counts = count_tokens([distinct_words()] * 3, words, num_embeddings=V, progress=False)
    both = [frequencies_of(counts, V, words, by_class=by_class)[0] for by_class in (False, True)]
    assert not torch.equal(*both)
    for calibration in (own_calibration, None):
        model = build("gpt2")
        options = {"calibration": calibration} if calibration else {"calibrate": False}
        report = embkern.compress(model, **PACKED, **options, counts=counts, tokenizer=words)
        frequencies, phrase = frequencies_of(counts, V, words, by_class=calibration is not None)
        assert report.counts == phrase
        expected = allocate(weight, ratio=2, counts=frequencies, calibration=calibration)
        assert same(stored_table(model), expected)


def test_a_calibration_on_words_that_the_counts_lack():
    words, model = tokenizer(), build("gpt2")
    counted = torch.zeros(len(model.get_input_embeddings().weight), dtype=torch.int64)
    counted[: len(counted) // 2] = 3
    others = " ".join(words.convert_ids_to_tokens(range(len(counted) // 2, len(counted) - 1)))
    found = calibrate(model, words, [others])
    assert not bool((found.inputs.bool() & counted.bool()).any())
    report = embkern.compress(model, **PACKED, calibration=found, counts=counted)
    assert report.ratio >= 2
    assert bool(torch.isfinite(stored_table(model).to_dense()).all())


def test_an_untied_input_and_a_dense_head_take_the_input_alone(own_calibration):
    weight = build("gpt2").get_input_embeddings().weight.detach().clone()
    expected = allocate(
        weight, ratio=2, counts=input_frequencies(own_calibration), calibration=own_calibration, tied=False
    )
    dense = build("gpt2")
    embkern.compress(dense, **PACKED, calibration=own_calibration, lm_head="dense")
    assert same(stored_table(dense), expected)


def test_an_untied_head_takes_the_sums_of_the_head_alone():
    model = build("llama-untied")
    calibration = self_calibrate(model, windows=2, length=16)
    input_weight, weight = (
        module.weight.detach().clone() for module in (model.get_input_embeddings(), model.lm_head)
    )
    tables = ["input", "output"]
    report = embkern.compress(model, **PACKED, tables=tables, calibration=calibration)
    frequencies = input_frequencies(calibration)
    predicted = calibration.predictions + PREDICTION_STRENGTH * frequencies
    head = dataclasses.replace(
        calibration,
        inputs=calibration.predictions,
        input_moment=calibration.head_moment,
        predictions=None,
        head_moment=None,
    )
    expected = allocate(weight, ratio=2, counts=predicted, calibration=head, tied=False)
    found = stored_tables(model)
    assert same(found["lm_head"], expected)
    same_input = allocate(input_weight, ratio=2, counts=frequencies, calibration=calibration, tied=False)
    assert same(found[""], same_input)
    assert [each.calibration for each in report.tables] == ["32 tokens of the model's own samples"] * 2
    q, errors = predicted / predicted.sum(), weight - found["lm_head"].to_dense()
    moment = calibration.head_moment / calibration.scored
    cost = 0.5 * (q * ((errors.double() @ moment) * errors).sum(1)).sum()
    assert report.tables[1].predicted_kl == pytest.approx(float(cost), rel=1e-4)
    assert report.predicted_kl == pytest.approx(sum(each.predicted_kl for each in report.tables))


@pytest.mark.usefixtures("few_samples")
def test_tables_that_a_calibration_does_not_measure_say_so():
    model = build("gpt2")
    weight = model.transformer.wpe.weight.detach().clone()
    report = embkern.compress(model, **PACKED, tables=["input", "wpe"])
    assert report.tables[0].calibration == "32 tokens of the model's own samples"
    assert report.tables[1].calibration == NOT_CALIBRATED
    assert report.tables[1].counts == "all rows weigh alike"
    assert report.tables[1].predicted_kl is None
    assert same(stored_tables(model)["wpe"], allocate(weight, ratio=2))
    with pytest.raises(ValueError, match="calibration: expected none: none, as it measures the input table"):
        embkern.compress(build("gpt2"), **PACKED, tables=["wpe"], calibrate=True)


@pytest.mark.usefixtures("few_samples")
def test_a_model_that_is_compressed_while_it_is_loaded(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "dense")
    tables = []
    for calibrated in (None, True, False):
        config = EmbkernConfig(ratio=4, calibrate=calibrated)
        model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
        tables.append(stored_table(model))
        model.save_pretrained(tmp_path / f"{calibrated}")
        saved = json.loads((tmp_path / f"{calibrated}" / "config.json").read_text())["quantization_config"]
        assert saved.get("calibrate") is calibrated
        again = T.AutoModelForCausalLM.from_pretrained(tmp_path / f"{calibrated}")
        assert same(stored_table(again), tables[-1])
    assert same(tables[0], tables[1])
    assert not same(tables[0], tables[2])


def test_what_would_take_too_long_is_left_out_by_default(monkeypatch, caplog):
    def slow(model, held_out, *, limit_seconds, **_):
        if limit_seconds is not None:
            raise CalibrationTooLongError(1500, limit_seconds)
        return self_calibrate_holding_out(model, held_out, windows=1, length=8)

    monkeypatch.setattr(choice, "self_calibrate_holding_out", slow)
    report = embkern.compress(build("gpt2"), **PACKED)
    assert report.calibration.startswith(
        "none, as it would take 25 minutes; pass calibrate=True (--calibrate)"
    )
    assert "calibration: none, as it would take 25 minutes" in caplog.text
    asked = embkern.compress(build("gpt2"), **PACKED, calibrate=True)
    assert asked.calibration == "8 tokens of the model's own samples"


def test_a_model_that_cannot_be_sampled_is_compressed_without(caplog):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    report = embkern.compress(model, **PACKED)
    assert report.calibration.startswith("none (")
    assert "calibration: none (" in caplog.text
    with pytest.raises(ValueError, match="calibrate: expected a language model to sample from"):
        embkern.compress(build("bert-backbone"), **PACKED, calibrate=True)


@pytest.mark.usefixtures("few_samples")
def test_refusals(own_calibration, tmp_path):
    def refused(message, name="gpt2", **arguments):
        with pytest.raises(ValueError, match=message):
            embkern.compress(build(name), **{**PACKED, **arguments})

    refused(
        "calibration: expected with method allocate only, got method 'svd'", method="svd", calibration="x"
    )
    refused("calibrate: expected with method allocate only, got method 'svd'", method="svd", calibrate=True)
    refused("expected one source, got calibration, calibrate", calibration=own_calibration, calibrate=True)
    refused("got calibration, calibrate=False", calibration=own_calibration, calibrate=False)
    refused("calibrate_text: expected a tokenizer with it", calibrate_text=tmp_path)
    refused("calibration: expected one of this model", name="bert", calibration=own_calibration)
    with pytest.raises(FileNotFoundError, match="calibration: expected a file of a calibration, found none"):
        embkern.compress(build("gpt2"), **PACKED, calibration=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="calibration: expected with method allocate only, got method 'svd'"):
        Recipe.parse(method="svd", ratio=2, calibration="x")
    with pytest.raises(ValueError, match="calibration: expected the path of a file, got Calibration"):
        EmbkernConfig(ratio=2, calibration=own_calibration)
    with pytest.raises(ValueError, match="calibration: expected it without calibrate, got both"):
        Recipe.parse(ratio=2, calibration="x", calibrate=True)
    with pytest.raises(ValueError, match="calibrate: Input should be a valid boolean"):
        Recipe.parse(ratio=2, calibrate="self")


@pytest.mark.usefixtures("few_samples")
def test_a_trained_model_warns(own_calibration):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="weights have changed"):
        embkern.compress(model, **PACKED, calibration=own_calibration)


@pytest.mark.usefixtures("few_samples")
def test_command_line(tmp_path, own_calibration, monkeypatch, capsys):
    build("gpt2").save_pretrained(tmp_path / "dense")
    own_calibration.save(tmp_path / "own.safetensors")
    seen = []
    for flags in (
        [],
        ["--calibrate"],
        ["--no-calibrate"],
        ["--calibration", str(tmp_path / "own.safetensors")],
    ):
        call = ["embkern", "compress", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "--overwrite"]
        monkeypatch.setattr("sys.argv", [*call, "--ratio", "2", "--json", *flags])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        seen.append(json.loads(capsys.readouterr().out)["calibration"])
    own = "32 tokens of the model's own samples"
    assert seen == [own, own, "none, as asked for", own]
