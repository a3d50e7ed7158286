"""The whole study: its rows, what it does after a kill, and a report whose every number is one of a row."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

T = pytest.importorskip("transformers")
for package in ("jinja2", "matplotlib", "scipy"):
    pytest.importorskip(package)

from embkern import study
from embkern.api import load_model, model_bytes
from embkern.evaluate.perplexity import perplexity
from embkern.json_file import read_checked_json, to_checked_json
from embkern.methods import METHODS
from embkern.study.document import value_at
from embkern.study.figures import Panel, draw, spread
from embkern.study.report import visible, write_report
from embkern.study.rows import Row
from embkern.study.spec import StudyOptions
from embkern.study.words import find_words, typical_words
from embkern.text import read_texts

ODD = [
    "<script>x</script>",
    "a|b",
    "new\nline",
    "\u202egnp.exe",
    "שלום",
    "**x**",
    "`y`",
    "\u0301",
    " ",
]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "red", "green", "blue", *ODD]
V, H = 67, 16
SIZES = dict(
    vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
MODELS = {
    "masked": lambda: T.BertForMaskedLM(T.BertConfig(**SIZES)),
    "causal": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)),
    "encoder": lambda: T.BertModel(T.BertConfig(**SIZES)),
}
LINES = ["red green blue", "blue <script> red", "green a|b green red", "blue blue", "red red green"]


def tokenizer() -> T.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "SEP", "UNK", "MASK")}
    return T.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)))
    return root


@pytest.fixture(scope="module", autouse=True)
def _short_lookups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embkern.study.measures.LOOKUP_ROUNDS", 3)
        yield


FEW = dict(ratios=[1.5, 2], methods=["svd", "allocate", "autoencoder:epochs=2"], progress=False)


@pytest.fixture(scope="module")
def done(models, tmp_path_factory) -> study.Study:
    """A study of the masked model with all there is to measure."""
    text = models / "text.txt"
    return study.compare(
        models / "masked", output=tmp_path_factory.mktemp("done"), **FEW, text=text, dataset=str(text),
        words=[*ODD[:5], "red"],
    )  # fmt: skip


def results(rows: list[Row], measure: str) -> dict:
    return {(row.method, row.ratio): row.result for row in rows if row.measure == measure}


def steady(rows: list[Row]) -> dict:
    """The results without what a clock says."""
    return {
        row.id: {k: v for k, v in (row.result or {}).items() if k not in ("compress_seconds", "sizes")}
        for row in rows
    }


# ---- rows ------------------------------------------------------------------------------------------------


def test_rows_agree_with_the_parts_that_measure(models, done):
    dense = load_model(models / "masked")
    own = perplexity(dense, tokenizer(), read_texts(models / "text.txt"), progress=False)
    found = results(done.rows, "perplexity")
    assert found["dense", None]["perplexity"] == own.perplexity
    assert found["svd", 2.0]["tied"]["perplexity"] != found["svd", 2.0]["input_only"]["perplexity"]
    assert found["svd", 2.0]["tied"]["tokens"] == own.tokens
    for (method, ratio), row in results(done.rows, "table").items():
        name = method.partition(":")[0]
        assert row["ratio"] == row["table_bytes"] / row["compressed_bytes"] >= ratio
        assert row["model_bytes"] - row["compressed_model_bytes"] == V * H * 4 - row["compressed_bytes"]
        assert (row["rank"] is None) == (METHODS[name].sized_by == "ratio")
    near = results(done.rows, "neighbors")
    assert {len(row["words"]) for row in near.values()} == {6}
    assert all(word["kept"] == 6 for word in near["dense", None]["words"])
    assert len(results(done.rows, "lookup")) == len(results(done.rows, "sentences")) == 6


def test_settings_of_perplexity_are_passed_on_and_in_the_command():
    given = dict(separator="eos", stride=7, line_filter="authors", max_tokens=99)
    asked = StudyOptions.parse(model="m", output="o", seed=3, **given)
    assert asked.protocol == {"seed": 3, **given}
    for option in ("--separator eos", "--stride 7", "--line-filter authors", "--max-tokens 99"):
        assert option in asked.command()


def test_a_command_holds_text_as_it_was_given():
    given = dict(dataset="data.0", words=["3.0"], methods=["allocate:exponent=1.0"])
    command = StudyOptions.parse(model="m", output="o", ratios=[5, 2.5], **given).command()
    for option in ("--dataset data.0", "--words 3.0", "--methods allocate:exponent=1.0", "--ratios 5 2.5"):
        assert f"{option} -" in command


def test_the_same_seed_gives_the_same_rows_and_another_gives_others(models, done, tmp_path):
    text = models / "text.txt"
    asked = dict(FEW, text=text, dataset=str(text), words=[*ODD[:5], "red"])
    again = study.compare(models / "masked", output=tmp_path / "again", **asked)
    assert steady(again.rows) == steady(done.rows)
    other = study.compare(models / "masked", output=tmp_path / "again", **asked, seed=1)
    assert not {row.id for row in other.rows} & {row.id for row in done.rows}
    table = [results(each.rows, "table")["autoencoder:epochs=2", 2.0]["rmse"] for each in (done, other)]
    assert table[0] != table[1]


def test_a_study_measures_what_is_new_and_nothing_else(models, tmp_path):
    asked = dict(output=tmp_path, progress=False, methods=["svd"])
    first = study.compare(models / "causal", ratios=[2], **asked)
    assert study.compare(models / "causal", ratios=[2], **asked).measured == 0
    more = study.compare(models / "causal", ratios=[2, 3], **asked)
    assert 0 < more.measured == len(more.rows) - len(first.rows)
    text = str(models / "text.txt")
    told = study.compare(models / "causal", ratios=[2, 3], dataset=text, **asked)
    assert told.measured == 3, "perplexity: of the dense model and at two ratios"
    damaged = tmp_path / "rows" / f"{first.rows[0].id}.json"
    whole = damaged.read_text()
    number = re.search(r"\d(?=\.\d+)", whole[whole.index('"result"') :])
    assert number is not None
    at = whole.index('"result"') + number.start()
    unprintable = to_checked_json({**read_checked_json(damaged), "command": "\ud800"})
    for content in ("{", "[" * 10**5, f"{whole[:at]}{9 - int(whole[at])}{whole[at + 1 :]}", unprintable):
        damaged.write_text(content)
        assert study.compare(models / "causal", ratios=[2], **asked).measured == 1
    assert study.compare(models / "causal", ratios=[2], overwrite=True, **asked).measured == len(first.rows)


@pytest.mark.slow
def test_a_killed_study_goes_on(models, tmp_path):
    arguments = [models / "masked", "--ratios", 2, 3, 4, "--methods", "svd", "allocate", "direction"]
    command = [sys.executable, "-m", "embkern", "compare", *map(str, arguments), "-o", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE)
    started = time.monotonic()
    while len(kept := list((tmp_path / "rows").glob("*.json"))) < 5:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - started < 100
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    rest = study.compare(
        models / "masked", output=tmp_path, ratios=[2, 3, 4], methods=["svd", "allocate", "direction"]
    )
    assert rest.measured <= len(rest.rows) - len(before)
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
    assert len(rest.rows) == 29
    assert rest.page.exists()


def test_a_ratio_out_of_reach_and_a_missing_package_are_rows_with_a_reason(models, tmp_path, monkeypatch):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("product_quantization needs faiss")

    lacking = METHODS["product_quantization"]._replace(compress=lacks)
    monkeypatch.setitem(METHODS, "product_quantization", lacking)
    asked = dict(output=tmp_path, ratios=[2, 500], methods=["svd", "product_quantization"], progress=False)
    done = study.compare(models / "encoder", **asked)
    reasons = {(row.method, row.ratio): row.reason for row in done.rows if row.reason}
    assert "no room for rank 1" in reasons["svd", 500.0]
    assert reasons["product_quantization", 2.0] == "product_quantization needs faiss"
    assert "no room for rank 1" in (tmp_path / "report.md").read_text(encoding="utf-8")
    tried = study.compare(models / "encoder", **asked).measured
    assert tried == sum(row.method == "product_quantization" for row in done.rows), "it may be there by now"


def test_a_sentence_encoder_has_no_perplexity_and_a_neighbour_no_model(models, tmp_path):
    text = models / "text.txt"
    done = study.compare(
        models / "encoder", output=tmp_path, ratios=[2], methods=["svd", "rtn"], text=text, dataset=str(text),
        keep_models=True, progress=False,
    )  # fmt: skip
    (row,) = [row for row in done.rows if row.measure == "perplexity"]
    assert "no language-model head" in row.reason
    assert {row.measure for row in done.rows if row.method == "rtn"} == {"table", "neighbors", "sentences"}
    table = results(done.rows, "table")["svd", 2.0]
    assert model_bytes(load_model(tmp_path / "models" / "svd-2x")) == table["compressed_model_bytes"]
    assert "## Perplexity" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_tied_head_that_cannot_decode_is_a_reason_too(models, tmp_path):
    done = study.compare(
        models / "masked", output=tmp_path, ratios=[2], methods=["autoencoder:epochs=1,activation=elu"],
        dataset=str(models / "text.txt"), keep_models=True, progress=False,
    )  # fmt: skip
    (row,) = [row for row in done.rows if row.reason]
    assert row.measure == "saved"
    assert "a tied head cannot decode through activation" in row.reason
    found = done.rows[-2].result
    assert found["input_only"]["tokens"] > 0
    assert found["tied"] is None
    assert results(done.rows, "table")[row.method, 2.0]["compressed_model_bytes"] is None


# ---- the command -----------------------------------------------------------------------------------------


def command_line(monkeypatch, capsys, *arguments: object) -> str:
    from embkern import cli

    monkeypatch.setattr(sys, "argv", ["embkern", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        if stopped.code:
            return capsys.readouterr().err.splitlines()[-1]  # transformers may show a bar before
    return capsys.readouterr().out


def test_a_rows_command_measures_it_again(models, tmp_path, monkeypatch, capsys):
    arguments = ["compare", models / "causal", "--ratios", 2, 3, "--methods", "svd", "svd:center=true"]
    shown = command_line(monkeypatch, capsys, *arguments, "--words", "red", "a|b", "-o", tmp_path, "--json")
    rows = [Row.model_validate(row) for row in json.loads(shown)["rows"]]
    row = next(row for row in rows if row.method == "svd:center=true" and row.ratio == 3)
    kept = {path: path.stat().st_ino for path in tmp_path.glob("rows/*.json")}
    program, *again = shlex.split(row.command)
    assert program == "embkern"
    assert again[-2:] == ["--row", row.id]
    measured = Row.model_validate_json(command_line(monkeypatch, capsys, *again))
    assert steady([measured]) == steady([row])
    changed = {path.stem for path, inode in kept.items() if path.stat().st_ino != inode}
    assert changed == {row.id}
    assert "row: 'abc' is not one of" in command_line(monkeypatch, capsys, *again[:-1], "abc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "svd", "magic"], "methods: expected NAME .* got 'magic'"),
        (["--methods", "svd:center"], "methods: expected NAME .* got 'svd:center'"),
        (["--methods", "svd:centre=true"], "svd: centre: .*known: .*center"),
        (["--ratios", "5", "0.5"], "ratio: expected at least 1 .*, got 0.5"),
        (
            ["--words", "red", "purple"],
            r"words: expected words that are one token, got 'purple', read as \[UNK\]",
        ),
        (["--max-tokens", "0"], "compare: max_tokens: .* got 0"),
        (["--device", "abacus"], "device: expected one that is there, got 'abacus' "),
        (["--dataset", "./none.txt"], "text: expected a file, a directory or a data set, found none"),
        (["--dataset", "{models}/empty.txt"], "text: expected some text, found none in .*empty.txt"),
        (["--dataset", "{models}/binary.txt"], "text: .*binary.txt is not UTF-8 text"),
        (["--text", "./none.txt"], "text: expected a text file, found none"),
        (["-o", "{models}"], "output: .* is, or holds, the model to read"),
    ],
)
def test_what_is_wrong_is_named(models, tmp_path, monkeypatch, capsys, arguments, message):
    filled = [each.format(models=models) for each in arguments]
    shown = command_line(monkeypatch, capsys, "compare", models / "masked", "-o", tmp_path / "out", *filled)
    assert re.search(f"^embkern: .*{message}", shown), shown
    assert not (tmp_path / "out" / "report.md").exists()


# ---- the report ------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects attributes, numbers of rows, and what else is in a cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.numbers: list[tuple[dict, str]] = []
        self.loose: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:  # XHTML closes them
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        inner, attributes = self.open[-1] if self.open else ("", {})
        if "data-row" in attributes:
            self.numbers.append((attributes, data))
        elif inner == "td":
            self.loose.append(data)


@pytest.fixture(scope="module")
def page(done) -> Page:
    return Page(done.page.read_text(encoding="utf-8"))


def test_the_page_loads_nothing(page, done):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,")), attributes
    assert not re.search(r"@import|url\(", done.page.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= set(ids)
    assert sum(tag == "img" for tag, _ in page.tags) == 3


def test_every_number_is_one_of_a_row(page, done):
    saved = json.loads((done.options.output / "rows.json").read_text(encoding="utf-8"))
    rows = {row["id"]: Row.model_validate(row) for row in saved["rows"]}
    for row in rows.values():
        kept = read_checked_json(done.options.output / "rows" / f"{row.id}.json")
        assert Row.model_validate(kept) == row
    shown: dict[str, set[str]] = {}
    for attributes, text in page.numbers:
        value = value_at(rows[attributes["data-row"]], attributes["data-key"])
        assert format(value, attributes["data-format"]) == text if "data-format" in attributes else True
        shown.setdefault(attributes["data-row"], set()).add(text)
    assert len(page.numbers) > 200
    assert not [text for text in page.loose if re.search(r"\d", text)]

    markdown = (done.options.output / "report.md").read_text(encoding="utf-8")
    cited = re.findall(r"^\| (.*) \| \[(\w{12})\]\(rows/\2\.json\) \|$", markdown, flags=re.M)
    assert len(cited) > 50
    for cells, row in cited:
        if rows[row].reason:
            continue  # its numbers are in the words of the reason
        for number in re.findall(r"(?:^|[ |])(\d[\d,.]*%?)(?= \||$)", cells):
            assert number in shown.get(row, set()) | {f"{rows[row].ratio or 0:g}"}, (cells, row)


def test_any_token_can_be_shown(page, done):
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "<script>x</script>" in page.text
    markdown = (done.options.output / "report.md").read_text(encoding="utf-8")
    assert "<script" not in re.sub("```.*?```", "", markdown, flags=re.S)
    assert "&#60;script&#62;" in markdown
    rendered = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    assert "<script>x</script>" in rendered.text
    assert not any(tag == "script" for tag, _ in rendered.tags)
    assert sum(tag == "table" for tag, _ in rendered.tags) == markdown.count("\n| ---")
    assert "\u202e" not in markdown + page.text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("new\nline", r"new\nline"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("שלום", "\u2068שלום\u2069"),
        ("\u0301", "◌\u0301"),
        ("\ud800", r"\ud800"),
        (" a", "␣a"),
        ("", "∅"),
        ("Ġthe", "Ġthe"),
    ],
)
def test_tokens_are_made_visible(token, shown):
    assert visible(token) == shown
    shown.encode("utf-8")


def test_the_same_study_gives_the_same_files(done, tmp_path):
    write_report(done, tmp_path)
    for name in ("report.md", "report.html", "figures/direction.svg", "figures/perplexity.svg"):
        assert (tmp_path / name).read_bytes() == (done.options.output / name).read_bytes()


def test_a_line_that_is_lost_leaves_the_panel_and_one_without_points_is_not_drawn():
    lines = {"svd": [(2.0, 11.0), (3.0, 1e12)], "rtn": [(2.0, 12.0)], "none": [], "zero": [(2.0, 0.0)]}
    svg = draw([Panel("one", lines, level=10.0), Panel("two", {})], list(lines), [2, 3])
    named = set(re.findall("<!-- (.*) -->", svg))
    assert {"svd ↑", "rtn", "dense", "one", "two"} <= named
    assert not {"svd", "none", "zero"} & named
    assert "1e" not in " ".join(named)


def test_a_picture_does_not_depend_on_the_settings_of_whoever_draws():
    matplotlib = pytest.importorskip("matplotlib")
    panels = [Panel("one", {"svd": [(2.0, 11.0), (3.0, 12.0)]}, level=10.0)]
    expected = draw(panels, ["svd"], [2, 3])
    settings = {"figure.constrained_layout.use": True, "font.size": 20.0, "lines.linewidth": 9.0}
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        assert draw(panels, ["svd"], [2, 3]) == expected
        assert dict(matplotlib.rcParams) == before


def test_names_of_lines_are_moved_apart_by_as_little_as_it_takes():
    assert spread([0.0, 30.0], 10) == [0.0, 30.0]
    assert spread([5.0, 5.0], 10) == [0.0, 10.0]
    assert spread([0.0, 1.0, 2.0, 50.0], 10) == [-9.0, 1.0, 11.0, 50.0]


def test_typical_words_go_from_frequent_to_rare():
    names = ["[CLS]", "##ing", "the", "of", "word", "ab", "zyx", "Ġno"]
    made = tokenizer()
    made.convert_ids_to_tokens = lambda ids: [names[i] if i < len(names) else None for i in ids]
    frequencies = torch.arange(10, 0, -1, dtype=torch.float64)
    assert typical_words(frequencies, made) == [7], "a vocabulary that marks words has no others"
    names[7] = "no"
    assert typical_words(frequencies, made) == [2, 4, 6]
    assert typical_words(frequencies, None) == [0, 1, 3, 6, 9]


def test_words_are_found_with_and_without_a_mark():
    made = tokenizer()
    made.get_vocab = lambda: {"Ġred": 3, "red": 4, "green": 5}
    assert find_words(["red", "green", "Ġred"], made) == [3, 5]
