"""The text of an installation: prose alone, and no document in two splits."""

import gzip

import pytest

from benchmarks.tools import installed_text
from benchmarks.tools.installed_text import Document, installed_documents, split
from tests.benchmarks.tools.tales import tale

pytestmark = pytest.mark.slow


def test_splits_are_of_different_documents_without_near_copies():
    documents = [Document("tales", str(n), [tale(2 * n), tale(2 * n + 1)]) for n in range(100)]
    copy = documents[3].paragraphs[0]
    documents += [
        Document("copies", str(n), [f"{copy} And this is added, for the copy {n}."]) for n in range(20)
    ]
    splits = split(documents, held_out_chars=2000, train_chars=10**6)
    document_of = {text: document for document in documents for text in document.paragraphs}
    test, valid, train = (
        {(document_of[text].source, document_of[text].name) for text in texts}
        for texts in (splits.test, splits.valid, splits.train)
    )
    assert test
    assert valid
    assert train
    assert len(test | valid | train) == len(test) + len(valid) + len(train)
    every = [text for texts in splits.named().values() for text in texts]
    assert sum(text.startswith(copy) for text in every) == 1
    assert split(documents[::-1], held_out_chars=2000, train_chars=10**6) == splits
    assert sum(splits.sources.values()) == sum(map(len, every))


PROSE = "This is what the function does when it is called with a list of the names of files."
MODULE = f'''# {PROSE.replace("function", "comment")[:40]}
# {PROSE.replace("function", "comment")[40:]}

class C:
    """{PROSE}

    >>> it is what it is and there is no prose in it, as it is to be run by the machine.
    """
    assigned = """{PROSE.replace("function", "string")}"""
'''
MANUAL = rf""".\" a comment
.TH LS 1
.SH NAME
ls \- list
.PP
{PROSE[:40]}
.BR {PROSE.split()[0]} (2)
{PROSE[40:].replace("names", chr(92) + "fBnames" + chr(92) + "fR").replace(".", " " + chr(92) + "(em all.")}
.nf
{PROSE}
.fi
"""


def test_documents_are_the_prose_of_an_installation(tmp_path, monkeypatch):
    (tmp_path / "lib" / "tests").mkdir(parents=True)
    (tmp_path / "lib" / "module.py").write_text(MODULE)
    (tmp_path / "lib" / "tests" / "test.py").write_text(MODULE)
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9\n" + MODULE.encode())
    (tmp_path / "README.gz").write_bytes(gzip.compress(f"{PROSE}\n\nx = 1\n\n{PROSE.upper()}\n".encode()))
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    (tmp_path / "ls.1.gz").write_bytes(gzip.compress(MANUAL.encode()))
    (tmp_path / "mdoc.1.gz").write_bytes(gzip.compress(f".Dd today\n{PROSE}\n".encode()))
    (tmp_path / "index.html").write_text(f"<h1>No</h1><P class=x>{PROSE.replace('list', '<b>list</b>')}</P>")
    found = {
        pattern: {document.name: document.paragraphs for document in installed_documents()}
        for pattern, reader in (
            ("lib/**/*.py", installed_text._python),
            ("*.html", installed_text._html),
            ("README*", installed_text._plain),
            ("broken*", installed_text._plain),
            ("*.1.gz", installed_text._manual),
        )
        if not monkeypatch.setattr(
            installed_text, "_sources", lambda p=pattern, r=reader: iter([("any", tmp_path, p, r)])
        )
    }
    assert found == {
        "lib/**/*.py": {"lib/module.py": [PROSE, PROSE.replace("function", "comment")]},
        "*.html": {"index.html": [PROSE]},
        "README*": {"README.gz": [PROSE, PROSE.upper()]},
        "broken*": {},
        "*.1.gz": {"ls.1.gz": [f"{PROSE[:40]} This(2) {PROSE[40:].removesuffix('.').strip()} -- all."]},
    }


def test_only_the_named_sources_are_read(tmp_path, monkeypatch):
    (tmp_path / "README").write_text(PROSE)
    sources = [(name, tmp_path, "README", installed_text._plain) for name in ("manual pages", "packages")]
    monkeypatch.setattr(installed_text, "_sources", lambda: iter(sources))
    assert [each.source for each in installed_documents()] == ["manual pages", "packages"]
    assert [each.source for each in installed_documents(["packages"])] == ["packages"]


def test_this_installation_has_documents():
    first = next(installed_documents())
    assert first.source == "standard library"
    assert all(installed_text.SHORTEST <= len(each) <= installed_text.LONGEST for each in first.paragraphs)
