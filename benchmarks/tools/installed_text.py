"""English prose that any Debian or Python installation has, split into train, valid and test by document.

Documents are the Python files of the standard library and of installed packages (docstrings and comments),
the descriptions and licences of installed distributions, and /usr/share/doc and the manual pages where they
exist. The set of documents depends on the installation, their order does not depend on the machine.
"""

from __future__ import annotations

import gzip
import html
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHORTEST, LONGEST = 80, 2000  # characters of a paragraph
FUNCTION_WORDS = """
    a an and are as at be been but by can does for from has have if in into is it its may more must no not of
    on only or other should so some such than that the their then there these they this to was when where
    which will with would you your
"""
FUNCTION_SHARE = 0.25  # of the words of a paragraph: code, tables and other languages have fewer
LETTER_SHARE = 0.9  # of the characters, spaces and the marks of sentences included

SHINGLE = 8  # words
SEEN_SHARE = 0.3  # the largest share of a paragraph's shingles that earlier paragraphs may contain
DOCUMENT_CHARS = 60_000  # of one document, so that no manual dominates the text
HELD_OUT_CHARS = 3_000  # of one held-out document, so that many are held out


@dataclass
class Document:
    """The paragraphs of a file, and the kind of source it comes from."""

    source: str
    name: str
    paragraphs: list[str]


@dataclass
class Splits:
    """Texts of one paragraph each; those of a document are consecutive, and all in one split."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)  # characters by source

    def named(self) -> dict[str, list[str]]:
        """Return the three splits by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def split(documents: Iterable[Document], *, held_out_chars: int, train_chars: int) -> Splits:
    """Assign documents to test, valid and train, in the order of a hash of their names.

    A paragraph is left out if more than ``SEEN_SHARE`` of its runs of ``SHINGLE`` words occur in earlier
    paragraphs of any split, so that held-out text has no near copy in the train text.

    Args:
        documents: of distinct (source, name).
        held_out_chars: of test and of valid, about.
        train_chars: of train, at most.
    """
    splits, seen = Splits(), set[int]()
    room = {"test": held_out_chars, "valid": held_out_chars, "train": train_chars}
    for document in sorted(documents, key=lambda each: (_hash(f"{each.source} {each.name}"), each.name)):
        name = next((name for name, left in room.items() if left > 0), None)
        if name is None:
            break
        limit = min(room[name], DOCUMENT_CHARS if name == "train" else HELD_OUT_CHARS)
        for paragraph in document.paragraphs:
            shingles = _shingles(paragraph)
            if len(shingles & seen) > SEEN_SHARE * len(shingles):
                continue
            seen |= shingles
            if limit > 0:  # paragraphs beyond the limit go to no other split
                splits.named()[name].append(paragraph)
                splits.sources[document.source] += len(paragraph)
                room[name] -= len(paragraph)
                limit -= len(paragraph)
    return splits


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))


def _shingles(paragraph: str) -> set[int]:
    words = re.findall(r"\w+", paragraph.lower())
    starts = range(max(1, len(words) - SHINGLE + 1))
    return {_hash(" ".join(words[start : start + SHINGLE])) for start in starts}


def installed_documents(sources: Collection[str] | None = None) -> Iterator[Document]:
    """Yield the documents of this installation that have a paragraph of prose, one per file.

    ``sources`` names the kinds to read; default: all.
    """
    for source, root, pattern, read in _sources():
        if sources is not None and source not in sources:
            continue
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root)
            if path.is_file() and not _LEFT_OUT & set(name.parts) and "changelog" not in path.name.lower():
                paragraphs = [each for each in map(_clean, read(_text(path))) if _is_prose(each)]
                if paragraphs:
                    yield Document(source, name.as_posix(), paragraphs)


_LEFT_OUT = {"site-packages", "test", "tests", "testing"}  # code that is tested with odd strings

Reader = Callable[[str], Iterable[str]]


def _sources() -> Iterator[tuple[str, Path, str, Reader]]:
    paths = sysconfig.get_paths()
    stdlib, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    yield "standard library", stdlib, "**/*.py", _python
    yield "packages", packages, "**/*.py", _python
    beside = stdlib / "site-packages"  # in the base of a virtual environment: pip and other packages
    if beside.is_dir() and not beside.samefile(packages):
        yield "base packages", beside, "**/*.py", _python
    for file in ("METADATA", "license*/**/*", "LICENSE*"):
        yield "distributions", packages, f"*.dist-info/{file}", _plain
    documentation = Path("/usr/share/doc")
    yield "documentation", documentation, "**/*.html", _html
    for suffix in ("README*", "NEWS*", "FAQ*", "copyright", "*.txt", "*.txt.gz", "*.md", "*.md.gz", "*.rst"):
        yield "documentation", documentation, f"**/{suffix}", _plain
    yield "manual pages", Path("/usr/share/man"), "man[1-9]/*.gz", _manual


def _text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""  # a broken link, not a text, or not in this encoding


def _plain(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


_DOCSTRING = r'(?:\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*\n)\s*[rRuU]?"""(.*?)"""'
_COMMENTS = r"^((?:[ \t]*#.*\n)+)"


def _python(text: str) -> Iterator[str]:
    """Yield the paragraphs of docstrings and of blocks of comments; parsing would take minutes."""
    for found in re.finditer(_DOCSTRING, text, re.DOTALL):
        yield from _plain(found[1])
    for found in re.finditer(_COMMENTS, text, re.MULTILINE):
        yield from _plain(re.sub(r"(?m)^[ \t]*#+:?", "", found[1]))


def _html(text: str) -> Iterator[str]:
    for paragraph in re.findall(r"<p\b[^>]*>(.*?)</p>", text, re.DOTALL | re.IGNORECASE):
        yield html.unescape(re.sub(r"<[^>]+>", "", paragraph))


_ROFF_ESCAPES = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " "}
_ROFF_SIGNS = dict(aq="'", cq="'", oq="'", lq='"', rq='"', dq='"', em="--", en="-", hy="-")


def _manual(text: str) -> Iterator[str]:
    """Yield the paragraphs of a manual page in man macros; nothing of one in mdoc macros."""
    if re.search(r"^\.Dd", text, re.MULTILINE):
        return
    text = re.sub(r"(?ms)^\.de.*?^\.\.$|^\.(?:nf|EX).*?^\.(?:fi|EE)\b.*?$", ".PP", text)
    lines: list[str] = []
    for line in text.splitlines():
        macro = re.match(r"[.'][ \t]*(\w*)[ \t]*(.*)", line)
        if not macro:
            lines.append(line)
        elif re.fullmatch("[BIR]|SM|SB", macro[1]):
            lines.append(macro[2].replace('"', ""))
        elif re.fullmatch(
            "[BIR]{2}", macro[1]
        ):  # arguments in alternating fonts, without spaces between them
            words = re.findall(r'"([^"]*)"?|(\S+)', macro[2])
            lines.append("".join(quoted or bare for quoted, bare in words))
        elif line.strip() not in (".", "'"):
            yield _unescaped("\n".join(lines))
            lines = []
    yield _unescaped("\n".join(lines))


def _unescaped(text: str) -> str:
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d+|\\[&,/:|^%]|\\\*(?:\[\w*\]|\(..|.)", "", text)
    text = re.sub(r"\\(?:\((..)|\[(\w+)\])", lambda found: _ROFF_SIGNS.get(found[1] or found[2], "\0"), text)
    return re.sub(r"\\(.)", lambda found: _ROFF_ESCAPES.get(found[1], "\0"), text)


_FUNCTION_WORDS = frozenset(FUNCTION_WORDS.split())
_MARKUP = re.compile(r"[-=~*^.]{4}|---|===|>>>|[{}\\=|]")


def _clean(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is whole sentences of English, by its ends, its letters and its function words."""
    if not (SHORTEST <= len(paragraph) <= LONGEST and paragraph.isprintable()) or _MARKUP.search(paragraph):
        return False
    if not paragraph[0].isalpha() or paragraph[-1] not in '.!?:)"':
        return False
    letters = sum(each.isalpha() or each in " ,.'" for each in paragraph)
    words = paragraph.lower().split()
    function_words = sum(word in _FUNCTION_WORDS for word in words)
    return letters >= LETTER_SHARE * len(paragraph) and function_words >= FUNCTION_SHARE * len(words)
