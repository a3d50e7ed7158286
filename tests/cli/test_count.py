"""``embkern count``."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")

from embkern.cli import main as cli
from embkern.text.counts import TokenCounts, count_tokens
from tests.example_tokenizers import LINES, of, wordpiece


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    wordpiece().save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embkern", "count", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run


def test_count_on_the_command_line(saved, tmp_path, run):
    first, second, out = tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c.safetensors"
    first.write_text("\n".join(LINES))
    second.write_bytes(b"the caf\xe9")
    arguments = (saved, "--text", first, "--text", second, "-o", out)
    code, _, errors = run(*arguments)
    assert (code, out.exists()) == (1, False)
    assert "b.md is not UTF-8 text" in errors

    code, printed, errors = run(*arguments, "--errors", "replace", "--json")
    assert (code, errors) == (0, ""), "no progress bar when piped"
    report, counts = json.loads(printed), TokenCounts.load(out)
    expected = count_tokens([*LINES, "the caf\ufffd"], wordpiece())
    assert torch.equal(counts.counts, expected.counts)
    assert (report["texts"], report["tokens"]) == (4, expected.tokens)
    assert report["distinct"] == len(of(expected, wordpiece()))
    top = [(each["token"], each["count"]) for each in report["top"]]
    assert top[:3] == [("the", 5), ("[CLS]", 4), ("[SEP]", 4)]

    code, _, errors = run(*arguments, "--errors", "replace")
    assert code == 1
    assert "c.safetensors exists" in errors
    code, printed, _ = run(*arguments, "--errors", "replace", "--overwrite")
    assert code == 0
    assert "[CLS] " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{saved}", "--text", "./none.txt", "-o", "{out}"],
            "text: expected a file, .* found none at ./none.txt",
        ),
        (["{saved}/none", "--text", "a.txt", "-o", "{out}"], "tokenizer: expected .* found none at .*/none"),
        (["{saved}", "--text", "x", "-o", "{out}", "--errors", "ignore"], "errors: .* got 'ignore'"),
        (
            ["{saved}", "--text", "x", "-o", "{out}/no/c"],
            "output: expected a file in a directory that exists",
        ),
        (["{saved}", "--text", "{out}", "-o", "{out}", "--overwrite"], "output: .* the text to read"),
    ],
)
def test_errors_of_count_name_the_argument(saved, tmp_path, run, arguments, message):
    code, _, errors = run(*(each.format(saved=saved, out=tmp_path / "out") for each in arguments))
    assert code == 1
    assert re.match(f"embkern: {message}", errors)
    assert not (tmp_path / "out").exists()
