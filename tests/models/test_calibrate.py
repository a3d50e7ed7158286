"""Calibration of every kind of model, compared with the dense gradient of its table, one window at a time."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
from torch.testing import assert_close

from embkern.models.calibrate import calibrate, kind_of
from embkern.models.calibrate.objectives import generator_of
from embkern.models.calibrate.windows import MASK_SHARE
from tests.models.calibrating import CLASSIFIERS, V, distinct_words, sharp, tokenizer, untied

LENGTH, SEED = 9, 4
LANGUAGE = [
    "llama-tied",
    "llama-untied",
    "gpt2",
    "gpt-neox",
    "gemma3",
    "gemma2",
    "granite",
    "bert",
    "roberta",
]
LANGUAGE += ["distilbert", "albert", "t5", "bart", "bart-scaled"]


def drawn(probabilities, draws):
    """The class of each row at which the cumulative probability exceeds the draw."""
    cumulative = probabilities.detach().numpy().cumsum(-1)
    rows = zip(cumulative, np.atleast_1d(draws), strict=True)
    return torch.tensor([int(np.searchsorted(row, draw * row[-1], side="right")) for row, draw in rows])


class Expected:
    """Sums over windows whose tokens are distinct, so that a row's gradient is that of its only lookup."""

    def __init__(self, model):
        self.model, self.embeddings = untied(model)
        H = self.embeddings[0].weight.shape[1]
        self.inputs, self.input_moment = torch.zeros(V).double(), torch.zeros(H, H).double()
        self.predictions, self.head_moment = torch.zeros(V).double(), torch.zeros(H, H).double()
        self.scored = 0

    def add(self, loss, *ids):
        gradients = torch.autograd.grad(loss, [each.weight for each in self.embeddings], allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                self.input_moment += gradient.t() @ gradient
        for each in ids:
            self.inputs += torch.bincount(each.flatten(), minlength=V)

    def assert_close(self, got):
        assert got.scored == self.scored
        assert torch.equal(got.inputs, self.inputs)
        for name in ("input_moment", "predictions", "head_moment"):
            if getattr(got, name) is not None:
                expected = getattr(self, name)
                assert float(expected.abs().max()) > 0
                assert_close(
                    getattr(got, name), expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max())
                )


def by_language_model(model):
    """The sums for a language model, by its class and config alone."""
    expected = Expected(model)
    ids = torch.tensor(tokenizer()(distinct_words())["input_ids"])
    count = 10
    for number in range(count):
        start = number * (len(ids) - LENGTH) // (count - 1)
        window, generator = ids[start : start + LENGTH].clone(), generator_of(SEED, number)
        places = torch.arange(LENGTH)
        if kind_of(model) == "masked":
            assert round(MASK_SHARE * LENGTH) == 1, "one mask: its row's gradient is that of one lookup"
            places = torch.tensor(generator.permutation(LENGTH)[:1])
            window[places] = tokenizer().mask_token_id
        inputs = {"input_ids": window[None]}
        if model.config.is_encoder_decoder:
            start_token = torch.tensor([model.config.decoder_start_token_id])
            inputs["decoder_input_ids"] = torch.cat([start_token, window[:-1]])[None]
        hidden = []
        head = expected.model.get_output_embeddings()
        handle = head.register_forward_hook(
            lambda _, given, output, hidden=hidden: hidden.append((given[0], output))
        )
        logits = expected.model(**inputs).logits
        handle.remove()
        (given, output), scored = hidden[0], logits[0, places]
        probabilities = scored.detach().softmax(-1)
        labels = drawn(probabilities, generator.random(len(places)))
        loss = torch.nn.functional.cross_entropy(scored, labels, reduction="sum")
        slope = torch.autograd.grad(logits.sum(), output, retain_graph=True)[0][0, places]
        expected.add(loss, *inputs.values())
        expected.scored += len(places)
        expected.predictions += probabilities.sum(0)
        given = given.detach()[0, places]
        for h, p, s in zip(given, probabilities, slope, strict=True):
            expected.head_moment += (p * s.square()).sum() * torch.outer(h, h)
    return expected


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    model = sharp(name)
    got = calibrate(
        model, tokenizer(), [distinct_words()], tokens=90, length=LENGTH, seed=SEED, progress=False
    )
    assert got.facts.kind == kind_of(model)
    assert got.head_moment is not None
    by_language_model(model).assert_close(got)


def sentence_texts():
    words = distinct_words().split()
    return [" ".join(words[:5]), " ".join(words[5:14]), words[14], " ".join(words[15:20]), "  "]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert-backbone", None),
        ("bert-backbone", "mean"),
        ("bert-backbone", "cls"),
        ("bert", "mean"),
        ("bert", "cls"),
    ],
)
def test_sentence_encoders(name, pooling):
    model = sharp(name)
    got = calibrate(
        model, tokenizer(), sentence_texts(), length=8, seed=SEED, pooling=pooling, progress=False
    )
    expected = Expected(model)
    for number, text in enumerate(sentence_texts()[:4]):
        ids = torch.tensor(tokenizer()(text)["input_ids"])[None, :8]
        hidden = expected.model.base_model(input_ids=ids).last_hidden_state[0]
        pooled = hidden[0] if pooling == "cls" else hidden.mean(0)
        z = torch.from_numpy(generator_of(SEED, number).standard_normal(len(pooled)))
        expected.add(z @ (pooled / pooled.norm()), ids)
        expected.scored += 1
    assert got.predictions is got.head_moment is None
    assert (got.facts.kind, got.facts.runs[0].pooling) == ("sentence", pooling or "mean")
    expected.assert_close(got)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    model = sharp(name)
    got = calibrate(model, tokenizer(), sentence_texts(), seed=SEED, progress=False)
    expected = Expected(model)
    for number, text in enumerate(sentence_texts()[:4]):
        ids = torch.tensor(tokenizer()(text)["input_ids"])[None]
        output, generator = expected.model(input_ids=ids), generator_of(SEED, number)
        if name == "answer":
            ends = [output.start_logits, output.end_logits]
        else:
            ends = [output.logits[0] if name == "token" else output.logits]
        loss = 0.0
        for stream, logits in enumerate(ends):
            generator = generator_of(SEED, number, stream)
            if name == "regression":
                loss = torch.from_numpy(generator.standard_normal(1)) @ logits[0]
            elif name == "labels":
                labels = torch.from_numpy(generator.random(3)) < logits[0].sigmoid()
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits[0], labels.double(), reduction="sum"
                )
            else:
                labels = drawn(logits.softmax(-1), generator.random(len(logits)))
                loss = loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        expected.add(loss, ids)
        expected.scored += ids.shape[1] if name == "token" else 1
    assert got.predictions is got.head_moment is None
    assert got.facts.kind == "classifier"
    expected.assert_close(got)
