"""``read_texts``: files, directories and data sets, and the errors of invalid ones."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types

import pytest

pytest.importorskip("transformers")

from embkern.text import reading
from embkern.text.counts import count_tokens
from embkern.text.reading import read_texts
from tests.example_tokenizers import byte_level, wordpiece


def test_a_directory_is_read_in_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("two\n\n  three\r\n")
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())  # with a byte-order mark
    (tmp_path / "c.jsonl").write_text(
        '{"text": "four\\nfour", "id": "4"}\n\n"five"\n{"body": "six", "n": 6}\n'
    )
    with gzip.open(tmp_path / "sub" / "d.txt.gz", "wt") as file:
        file.write("seven\n")
    (tmp_path / "sub" / "e.bin").write_bytes(b"\xff\0")
    expected = ["one", "two", "  three", "four\nfour", "five", "six", "seven"]
    assert list(read_texts(tmp_path)) == expected
    (tmp_path / "f.text").write_text("eight")  # a file that is named is read whatever its name
    assert list(read_texts(str(tmp_path / "f.text"))) == ["eight"]


def test_a_long_line_is_cut_at_white_space_and_never_held_whole(tmp_path):
    words = " ".join(f"word{i}" for i in range(400_000))  # 4 MB
    path = tmp_path / "t.txt"
    path.write_text(words + "\nend\n" + "x" * 2500)
    pieces = list(read_texts(path, max_chars=1000))
    cut = pieces.index("end")
    assert "".join(pieces[:cut]) == words
    assert all(len(piece) <= 1000 for piece in pieces)
    assert all(piece[0] == " " and piece[-1] != " " for piece in pieces[1:cut])
    assert pieces[cut + 1 :] == ["x" * 1000, "x" * 1000, "x" * 500], "no white space: cut anywhere"

    program = f"""
import resource
from embkern.text import read_texts
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
print(sum(map(len, read_texts({str(path)!r}))), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    read, more = map(int, done.stdout.split())
    assert read == len(words) + 3 + 2500
    assert more < 3000, "KiB; the file has 4.2 MB"


def test_a_long_record_is_cut_too(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "one two\nthree"}))
    assert list(read_texts(path, max_chars=8)) == ["one two\n", "three"]
    assert list(read_texts(path, max_chars=4)) == ["one", " two", "\nthr", "ee"]
    assert list(read_texts(path, max_chars=6)) == ["one", " two", "\nthree"]


@pytest.mark.parametrize(
    ("data", "replaced"),
    [
        (b"caf\xe9 noir", "caf\ufffd noir"),
        (b"\xff\xfea\0b\0", "\ufffd\ufffda\ufffdb\ufffd"),
        (b"a\0b", "a\ufffdb"),
    ],
    ids=["latin-1", "utf-16", "NUL"],
)
def test_what_is_not_text_is_refused_or_replaced(tmp_path, data, replaced):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"text: .*t.txt is not UTF-8 text .*--errors replace"):
        list(read_texts(path))
    assert list(read_texts(path, errors="replace")) == [replaced]
    assert count_tokens(read_texts(path, errors="replace"), wordpiece()).tokens > 2


def test_a_lone_surrogate_in_json_is_refused_or_replaced(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('"fine"\n"a \\ud83d b"\n')
    with pytest.raises(ValueError, match="t.jsonl, line 2 is not UTF-8 text"):
        list(read_texts(path))
    counts = count_tokens(read_texts(path, errors="replace"), byte_level())
    assert counts.texts == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"", "text: expected some text, found none in"),
        ("t.txt", b" \n\t\n", "text: expected some text, found none in"),
        ("t.jsonl", b'{"text": ""}', "text: expected some text, found none in"),
        ("t.jsonl", b'"a"\n{"text": ', "line 2 is not JSON"),
        ("t.jsonl", b'{"a": "b", "c": "d"}', r"line 1: expected a string 'text', or .* got \['a', 'c'\]"),
        ("t.jsonl", b"[1]", "line 1: expected a string 'text', or a single string in a record, got .*list"),
        ("t.txt.gz", b"no gzip", "t.txt.gz is not a complete gzip file"),
        ("t.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "t.txt.gz is not a complete gzip file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path))


def test_a_json_line_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_JSON_LINE", 50)
    (tmp_path / "t.jsonl").write_text('"short"\n' + json.dumps("x" * 60))
    with pytest.raises(ValueError, match="line 2: expected fewer than 50 characters"):
        list(read_texts(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("name", ["./none", "/none/t", "none.txt", "none.jsonl.gz"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"text: expected a file, .* found none at {name}"):
        list(read_texts(name))


def test_an_empty_directory_and_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected files named \*.txt, .* found none"):
        list(read_texts(tmp_path))
    with pytest.raises(ValueError, match="errors: expected strict or replace, got 'ignore'"):
        list(read_texts(tmp_path, errors="ignore"))
    with pytest.raises(ValueError, match="max_chars: expected at least 1, got 0"):
        list(read_texts(tmp_path, max_chars=0))


@pytest.fixture
def hub(monkeypatch) -> list:
    """Replace the datasets library by one data set; return the calls that it received."""
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name != "owner/news":
            raise ConnectionError("no route\nto the hub")
        yield {"title": "one", "text": "two"}
        if split == "broken":
            raise TimeoutError("gone")

    module = types.ModuleType("datasets")
    module.load_dataset = lambda *a, **k: (
        load_dataset(*a, **k) if a[0] == "owner/news" else next(load_dataset(*a, **k))
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_data_set_is_streamed(hub):
    assert list(read_texts("owner/news")) == ["two"]
    assert list(read_texts("owner/news:small:test:title")) == ["one"]
    assert list(read_texts("owner/news::test")) == ["two"]
    assert hub == [
        ("owner/news", None, "train", True),
        ("owner/news", "small", "test", True),
        ("owner/news", None, "test", True),
    ]
    with pytest.raises(ValueError, match=r"expected a string 'body' in a record, got \['title', 'text'\]"):
        list(read_texts("owner/news:::body"))
    with pytest.raises(ValueError, match=r"expected name\[:config\]\[:split\]\[:column\]"):
        list(read_texts("owner/news:a:b:c:d"))
    with pytest.raises(FileNotFoundError, match="'owner/none' is neither a file nor .*: no route$"):
        list(read_texts("owner/none"))
    with pytest.raises(OSError, match="reading the data set 'owner/news::broken' failed: gone"):
        list(read_texts("owner/news::broken"))


def test_a_data_set_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="'owner/news' is not a file, .*pip install datasets"):
        list(read_texts("owner/news"))
