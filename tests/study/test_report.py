"""The report of a study: every number comes from a row, and any token can be shown."""

from __future__ import annotations

import html.parser
import json
import re

import pytest
from markdown_it import MarkdownIt

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
from embkern.io.checked_json import read_checked_json
from embkern.study import Row
from embkern.study.document import value_at
from embkern.study.report import write_report
from embkern.text.token_names import visible

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects attributes, numbers of rows, and other text in cells."""

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


def test_every_number_comes_from_a_row(page, done):
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
            continue  # the reason may hold numbers
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
