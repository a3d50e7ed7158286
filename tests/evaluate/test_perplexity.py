"""Perplexity: transformers' own losses, whole words, figures that follow from text, model and seed alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch

T = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import embkern
from embkern.cli import main as cli
from embkern.evaluate import TableSwap, evaluate_perplexity, measure_perplexity
from embkern.evaluate import perplexity as module
from embkern.evaluate.perplexity import perplexity
from embkern.evaluate.windows import causal_windows, masked_windows, whole_words
from tests.example_models import build
from tests.example_tables import packed_of, quantizing  # noqa: F401 (a fixture)
from tests.example_tokenizers import SENTENCES

TEXTS = SENTENCES.read_text(encoding="utf-8").splitlines()[:24]
VOCABULARY = 101  # of the models of tests.models
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def wordpieces(special: list[str]) -> dict[str, int]:
    """The most frequent pieces of the words of TEXTS, letters first; a trainer's differ from run to run."""
    counts: Counter[str] = Counter()
    for word in re.findall(r"\w+|[^\w\s]", " ".join(TEXTS)):
        for start, end in itertools.combinations(range(min(len(word), 9) + 1), 2):
            counts[("##" if start else "") + word[start:end]] += 1
    ordered = sorted(counts, key=lambda piece: (len(piece.removeprefix("##")) > 1, -counts[piece], piece))
    return {piece: number for number, piece in enumerate([*special, *ordered][:VOCABULARY])}


def subwords(kind: str = "wordpiece"):
    """A tokenizer of the models' size with many words of several tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(wordpieces(special), unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.add_special_tokens(special)
    else:
        raw = Tokenizer(models.BPE(unk_token="[UNK]"))
        spaces = {"byte level": pre_tokenizers.ByteLevel, "sentencepiece": pre_tokenizers.Metaspace}
        raw.pre_tokenizer = spaces[kind]()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        raw.train_from_iterator(TEXTS, trainer)
    ids = [(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    tokens = {f"{name}_token": token for name, token in names.items()}
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


@pytest.fixture(scope="module")
def tokenizer():
    return subwords()


def sharp(name: str):
    """A model whose predictions are far from uniform, so that a wrong one shows."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def masks(texts, tokenizer, **changed):
    settings = dict(vocabulary_size=VOCABULARY, max_length=64, seed=0, probability=0.15, masking="80-10-10")
    return list(masked_windows(texts, tokenizer, **{**settings, **changed}))


# ---- against transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_causal_models_have_transformers_own_loss(name, tokenizer):
    model, (length, stride) = sharp(name), (32, 12)
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt").input_ids[:, :-1]  # it begins with [CLS]
    total, count, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):  # as transformers documents it
        before, end = end, min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - end] = -100 if before else labels[:, : before - end]
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids[:, begin:end], labels=labels).loss) * scored
        count += scored
        if end == ids.shape[1]:
            break
    assert count == ids.shape[1] - 1, "every token but the first, once"
    got = perplexity(model, tokenizer, TEXTS, max_length=length, stride=stride)
    assert (got.kind, got.tokens) == ("causal", count)
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_masked_models_have_transformers_own_loss(name, tokenizer):
    model = sharp(name)
    total = count = 0
    for window in masks(TEXTS, tokenizer, max_length=40):
        labels = torch.full((1, len(window.ids)), -100)
        labels[0, window.positions] = torch.from_numpy(window.targets)
        with torch.no_grad():
            loss = model(torch.from_numpy(window.ids)[None], labels=labels).loss
        total, count = total + float(loss) * len(window.targets), count + len(window.targets)
    got = perplexity(model, tokenizer, TEXTS, max_length=40)
    assert (got.kind, got.tokens) == ("masked", count)
    assert got.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


# ---- windows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "sentencepiece"])
def test_whole_words_are_masked_and_nothing_else(kind):
    tokenizer = subwords(kind)
    for text, window in zip(TEXTS, masks(TEXTS, tokenizer, masking="mask", max_length=999), strict=True):
        encoded = tokenizer(text)
        words, ids = encoded.word_ids(), np.array(encoded.input_ids)
        expected = ids.copy()
        expected[window.positions] = tokenizer.mask_token_id
        assert window.ids.tolist() == expected.tolist()
        assert window.targets.tolist() == ids[window.positions].tolist()
        masked = {words[i] for i in window.positions}
        assert None not in masked, "special tokens are not masked"
        assert [i for i, word in enumerate(words) if word in masked] == window.positions.tolist()
        assert len(window.positions) <= max(1, round(0.15 * len(ids)))


def test_a_share_of_the_tokens_is_masked_and_a_word_beyond_it_is_skipped():
    words = np.array([-1, *np.repeat(np.arange(40), 2), -1])
    chosen = [whole_words(words, 0.15, np.random.default_rng(i)) for i in range(300)]
    assert {len(each) for each in chosen} == {12}, "round(.15 * 82), in words of two tokens"
    often = np.bincount(np.concatenate(chosen), minlength=82)
    assert often[0] == often[-1] == 0
    assert 0.3 < often[1:-1].min() / often[1:-1].mean() < often[1:-1].max() / often[1:-1].mean() < 1.8
    assert len(whole_words(np.array([-1, 0, 0, 0, -1]), 0.15, np.random.default_rng(0))) == 0


def test_of_masked_tokens_a_tenth_is_random_and_a_tenth_is_kept(tokenizer):
    windows = masks(TEXTS * 20, tokenizer)
    ids, targets = (
        np.concatenate(each) for each in ([w.ids[w.positions] for w in windows], [w.targets for w in windows])
    )
    replaced = float((ids == tokenizer.mask_token_id).mean())
    kept = float((ids == targets).mean())
    assert replaced == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.03)
    assert len(set(ids[(ids != targets) & (ids != tokenizer.mask_token_id)])) > 50


def test_masks_depend_on_the_seed_and_on_the_windows_number_alone(tokenizer):
    def of(windows):
        return [(window.ids.tolist(), window.positions.tolist()) for window in windows]

    whole = of(masks(TEXTS, tokenizer))
    assert of(masks(iter(TEXTS), tokenizer)) == whole
    assert of(masks(TEXTS[:9], tokenizer)) == whole[: len(of(masks(TEXTS[:9], tokenizer)))]
    assert of(masks(TEXTS, tokenizer, seed=1)) != whole


def test_a_long_text_goes_on_in_the_next_window(tokenizer):
    text = " ".join(TEXTS)
    windows = masks([text], tokenizer, max_length=20)
    original = [np.put(w.ids, w.positions, w.targets) or w.ids[1:-1].tolist() for w in windows]
    assert list(itertools.chain(*original)) == tokenizer(text, add_special_tokens=False).input_ids
    assert {len(window.ids) for window in windows[:-1]} == {20}


def test_the_authors_filter_takes_headings_and_short_lines_out(tokenizer):
    vocabulary = {**tokenizer.get_vocab(), "=": VOCABULARY}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wide = T.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", mask_token="[MASK]")
    lines = [" = = Heading = = ", "e " * 19, "e " * 20, "= " * 9 + "e " * 20, "e " * 19 + "= "]
    windows = masks(lines, wide, line_filter="authors")
    assert [len(window.ids) for window in windows] == [20, 20]
    assert all(VOCABULARY not in window.ids for window in windows)


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 1), (16, 16), (900, 900)])
def test_causal_windows_predict_every_token_once(length, stride, tokenizer):
    ids = tokenizer("\n".join(TEXTS), add_special_tokens=False).input_ids
    ids = [tokenizer.cls_token_id, *ids]
    windows = list(causal_windows(TEXTS, tokenizer, max_length=length, stride=stride))
    assert sum(window.read for window in windows) == len(ids)
    predicted = []
    for number, window in enumerate(windows):
        first = number * stride
        assert window.ids.tolist() == ids[first : first + length]
        assert (window.ids[window.positions + 1] == window.targets).all()
        predicted += (window.positions + 1 + first).tolist()
    without = {number * stride for number in range(len(windows))} if stride == length else {0}
    assert predicted == [i for i in range(len(ids)) if i not in without]


def test_texts_may_end_with_their_own_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="separator: expected newline, as the tokenizer has no end-of-text"):
        list(causal_windows(TEXTS, tokenizer, max_length=99, stride=99, separator="eos"))
    tokenizer.eos_token = "[PAD]"
    (window,) = causal_windows(TEXTS[:2], tokenizer, max_length=9999, stride=99, separator="eos")
    one, other = (tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS[:2])
    assert window.ids.tolist() == [tokenizer.cls_token_id, *one, 0, *other, 0]
    assert len(window.targets) == len(window.ids) - 1


def test_texts_are_read_as_far_as_asked(tokenizer):
    endless = itertools.cycle(TEXTS)
    windows = masks(endless, tokenizer, max_tokens=500)
    assert 500 <= sum(window.read for window in windows) < 500 + 64
    windows = list(causal_windows(endless, tokenizer, max_length=64, stride=32, max_tokens=501))
    assert sum(window.read for window in windows) == 501


# ---- what a figure depends on ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_batches_agree_and_runs_repeat(name, tokenizer):
    model = sharp(name)
    first, *others = [
        perplexity(model, tokenizer, iter(TEXTS), batch_size=size, max_length=48) for size in (8, 8, 1, 5)
    ]
    assert others[0] == first, "the same bits"
    for each in others:
        assert each.tokens == first.tokens
        assert each.loss == pytest.approx(first.loss, rel=1e-5)
    if name != "gpt2":
        assert perplexity(model, tokenizer, TEXTS, seed=1).loss != first.loss


def test_a_model_without_parts_is_run_whole(tokenizer, monkeypatch):
    models = {name: sharp(name) for name in ("bert", "gpt2")}
    tables = {"packed": packed_of(torch.randn(VOCABULARY, 32))}
    in_parts = {n: evaluate_perplexity(model, tokenizer, TEXTS, tables) for n, model in models.items()}
    monkeypatch.setattr(module, "_body_of", lambda model: (None, None))
    for name, model in models.items():
        whole = evaluate_perplexity(model, tokenizer, TEXTS, tables)
        for ours, other in (
            (whole.model, in_parts[name].model),
            (whole.tables[0].input_only, in_parts[name].tables[0].input_only),
            (whole.tables[0].tied, in_parts[name].tables[0].tied),
        ):
            assert ours.loss == pytest.approx(other.loss, rel=1e-5)


def test_logits_come_in_blocks(tokenizer, monkeypatch):
    model = sharp("bert")
    before = perplexity(model, tokenizer, TEXTS)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    assert perplexity(model, tokenizer, TEXTS).loss == pytest.approx(before.loss, rel=1e-6)


def test_the_model_is_left_as_it_was(tokenizer):
    model = sharp("gpt2").train()
    table = packed_of(model.transformer.wte.weight.detach())
    before = dict(model.named_modules())
    own = dict(model.transformer.__dict__)

    def breaking():
        yield from TEXTS
        raise OSError("the connection is lost")

    evaluate_perplexity(model, tokenizer, TEXTS, {"packed": table})
    with pytest.raises(OSError, match="the connection is lost"):
        evaluate_perplexity(model, tokenizer, breaking(), {"packed": table})
    with pytest.raises(RuntimeError, match="inside"), TableSwap(model, table).inputs_and_heads():
        assert type(model.lm_head).__name__ == "PackedHead"
        raise RuntimeError("inside")
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is each for name, each in before.items())
    assert {**model.transformer.__dict__, "training": True} == own
    assert model.training
    assert model.config.use_cache


# ---- other tables ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quantizing")
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "opt", "llama-untied"])
@pytest.mark.parametrize("recipe", [dict(method="svd", rank=9), dict(method="quantize", ratio=2)])
def test_a_table_gives_the_figures_of_the_compressed_model(name, recipe, tokenizer):
    made = {head: sharp(name) for head in ("factorized", "dense")}
    for head, model in made.items():
        embkern.compress(model, **recipe, lm_head=head)
    expected = {head: perplexity(model, tokenizer, TEXTS) for head, model in made.items()}

    model = sharp(name)
    table = made["dense"].get_input_embeddings().table
    report = evaluate_perplexity(
        model, tokenizer, TEXTS, {"small": table, "decoded": table.to_dense(), "own": made_of(model)}
    )
    small, decoded, own = report.tables
    assert report.model == perplexity(sharp(name), tokenizer, TEXTS)
    alone = evaluate_perplexity(model, tokenizer, TEXTS, {"small": table}, own=False)
    assert (alone.model, alone.tables) == (None, [small])
    assert own.input_only == report.model
    assert small.input_only.loss != report.model.loss, "a table that was not swapped has the same bits"
    for each in (small, decoded):
        assert each.input_only.loss == pytest.approx(expected["dense"].loss, rel=1e-5)
        if name == "llama-untied":
            assert each.tied is None
        else:
            assert each.tied.loss == pytest.approx(expected["factorized"].loss, rel=1e-5)
            assert each.tied.loss != each.input_only.loss
            assert own.tied == report.model


def made_of(model):
    return model.get_input_embeddings().weight.detach().clone()


def test_an_activation_leaves_no_tied_figure(tokenizer):
    model = sharp("bert")
    factors = embkern.methods.autoencoder(made_of(model), 5, epochs=1, activation="elu")
    table = evaluate_perplexity(model, tokenizer, TEXTS, {"elu": factors}).tables[0]
    assert table.input_only.loss > 0
    assert table.tied is None


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-backbone", "model: BertModel has no language-model head"),
        ("t5", "model: T5ForConditionalGeneration is an encoder-decoder"),
        ("xlnet", "model: XLNetLMHeadModel looks ahead"),
        ("bert-lm", "model: BertLMHeadModel looks ahead"),
    ],
)
def test_models_without_a_perplexity_are_refused(name, message, tokenizer):
    if name == "xlnet":
        config = T.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
        model = T.XLNetLMHeadModel(config)
    else:
        bert = T.BertConfig(vocab_size=VOCABULARY, **SIZES)
        model = T.BertLMHeadModel(bert) if name == "bert-lm" else build(name)
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"max_length": 65}, "max_length: expected at most the model's 64, got 65"),
        ("roberta", {"max_length": 64}, "max_length: expected at most the model's 63, got 64"),
        ("bert", {"stride": 3}, "stride: expected with causal models only"),
        ("bert", {"separator": "eos"}, "separator: expected with causal models only"),
        ("gpt2", {"stride": 65}, r"stride: expected at most max_length \(64\), got 65"),
        ("gpt2", {"line_filter": "authors"}, "line_filter: expected with masked models only"),
        ("bert", {"mask_probability": 1.5}, "perplexity: mask_probability: .* got 1.5"),
        ("bert", {"masking": "all"}, "masking: .*'80-10-10' or 'mask'"),
        ("bert", {"seeed": 1}, r"seeed: .*\(known: seed, "),
    ],
)
def test_settings_out_of_range_are_named(name, settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        perplexity(build(name), tokenizer, TEXTS, **settings)


def test_arguments_that_do_not_fit_are_named(tokenizer):
    bert = build("bert")
    with pytest.raises(TypeError, match="texts: expected an iterable of str"):
        perplexity(bert, tokenizer, "a text")
    with pytest.raises(ValueError, match="texts: expected tokens to predict, found none"):
        perplexity(bert, tokenizer, [])
    with pytest.raises(ValueError, match="tokenizer: expected the model's, got None"):
        perplexity(bert, None, TEXTS)
    with pytest.raises(ValueError, match="tables: expected some to measure without the model's own"):
        evaluate_perplexity(bert, tokenizer, TEXTS, own=False)
    with pytest.raises(ValueError, match=r"tables: expected the model's \(101, 32\), got \(101, 31\)"):
        evaluate_perplexity(bert, tokenizer, TEXTS, {"narrow": torch.zeros(101, 31)})
    small = T.BertForMaskedLM(T.BertConfig(vocab_size=20, **SIZES))
    with pytest.raises(ValueError, match="tokenizer: has ids beyond the model's 20 tokens"):
        perplexity(small, tokenizer, TEXTS)
    tokenizer = subwords("byte level")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: has no mask token"):
        perplexity(bert, tokenizer, TEXTS)


# ---- saved models and the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("perplexity")
    sharp("bert").save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    for name, head in (("svd", "factorized"), ("input", "dense")):
        embkern.compress(root / "dense", method="svd", rank=9, lm_head=head, output=root / name)
    (root / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return root


def test_saved_models_beside_the_dense_one(saved, tokenizer):
    names = [str(saved / name) for name in ("svd", "input")]
    run = measure_perplexity(names, saved / "text.txt", against=str(saved / "dense"), max_length=48)
    both, input_only = run.tables
    assert input_only.input_only == both.input_only
    assert input_only.tied is None, "saved with a dense head"
    alone = [measure_perplexity([name], saved / "text.txt", max_length=48) for name in names]
    assert both.tied.loss == pytest.approx(alone[0].model.loss, rel=1e-5)
    assert both.input_only.loss == pytest.approx(alone[1].model.loss, rel=1e-5)
    assert run.nbytes == {str(saved / "dense"): 101 * 32 * 4, **dict.fromkeys(names, (101 + 32) * 9 * 4)}
    low = measure_perplexity(names[:1], saved / "text.txt", against=str(saved / "dense"), dtype="bfloat16")
    assert low.dtype == "bfloat16"
    assert low.tables[0].tied.loss == pytest.approx(both.tied.loss, rel=0.05)


def test_models_that_do_not_belong_together_are_refused(saved, tmp_path):
    dense, text = str(saved / "dense"), saved / "text.txt"
    with pytest.raises(ValueError, match="against: expected the dense model with 2 models, got none"):
        measure_perplexity([dense, dense], text)
    with pytest.raises(
        ValueError, match="model: expected one compressed by embkern with against, got a dens"
    ):
        measure_perplexity([dense], text, against=dense)
    trained = T.AutoModelForMaskedLM.from_pretrained(dense)
    with torch.no_grad():
        trained.bert.encoder.layer[0].output.dense.bias.add_(1)
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match="1 of its other tensors differ, such as bert.encoder.layer.0.output"
    ):
        measure_perplexity([str(saved / "svd")], text, against=str(tmp_path / "trained"))
    with pytest.raises(ValueError, match=r"device: expected one that is there, got 'cuda:99' \("):
        measure_perplexity([dense], text, device="cuda:99")
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype of torch, got 'int8'"):
        measure_perplexity([dense], text, dtype="int8")


@pytest.fixture
def run(saved, monkeypatch, capsys):
    """The command, in the directory of the models: its output, or its error and exit code."""

    def run_command(*arguments: str):
        monkeypatch.chdir(saved)
        monkeypatch.setattr(sys, "argv", ["embkern", "evaluate", "perplexity", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed, error = capsys.readouterr()
        return printed if end.value.code == 0 else (end.value.code, error)

    return run_command


def test_the_command_traces_its_figures(run):
    arguments = ["svd", "--against", "dense", "--dataset", "text.txt", "--max-tokens", "400", "--seed", "3"]
    got = json.loads(run(*arguments, "--json"))
    assert got["command"] == " ".join(["embkern evaluate perplexity", *arguments, "--json"])
    assert (got["source"], got["dataset"], got["tables"][0]["name"]) == ("dense", "text.txt", "svd")
    assert (got["settings"]["seed"], got["settings"]["max_length"]) == (3, 64)
    assert got["model"]["perplexity"] == pytest.approx(math.exp(got["model"]["loss"]))
    assert got["tables"][0]["tied"]["tokens"] == got["model"]["tokens"] < got["read"]


def test_the_command_prints_both_figures(run):
    shown = run("svd", "--against", "dense", "--dataset", "text.txt", "--masking", "mask")
    figures = measure_perplexity(["svd"], "text.txt", against="dense", masking="mask")
    for figure in (figures.model, figures.tables[0].input_only, figures.tables[0].tied):
        assert f"{figure.perplexity:.2f}" in shown
    assert "input only" in shown
    assert "tied head" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text: expected some text, found none in"),
        (b"\x00\x01\x02", "is not UTF-8 text"),
        (b"\xff\xfe", "errors='replace' (--errors replace) reads it"),
    ],
)
def test_files_that_are_no_text(content, message, saved, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        measure_perplexity([str(saved / "dense")], tmp_path / "t.txt")


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_file_of_one_line(size, saved, tmp_path):
    (tmp_path / "t.txt").write_text("the cat " * size, encoding="utf-8")
    got = measure_perplexity([str(saved / "dense")], tmp_path / "t.txt", max_tokens=2000)
    assert abs(got.model.tokens - 0.15 * got.read) <= max(0.5, 0.01 * got.read)
    assert got.read < 2100


def test_a_hub_out_of_reach_is_one_line(run, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    code, error = run("dense", "--dataset", "some/texts::test")
    last = error.splitlines()[-1]
    assert code == 1
    assert last.startswith(
        "embkern: text: 'some/texts::test' is neither a file nor a data set that the hub provides"
    )
    assert last.endswith("no route")
