"""Real text of an installation: the sentences of docstrings, and messages of programs in other languages."""

from __future__ import annotations

import ast
import functools
import gettext
import random
import re
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CATALOGUES = Path("/usr/share/locale")
PACKAGES = ("torch", "transformers", "numpy", "scipy", "matplotlib", "huggingface_hub", "pydantic")


@functools.cache
def docstrings() -> list[str]:
    """Return sentences of the docstrings of the standard library and some installed packages, shuffled.

    Each sentence has 40 to 300 characters and at least 7 words, is mostly letters, and occurs once. They
    depend on the installed packages, so that figures of two machines agree only approximately.
    """
    roots = [Path(sysconfig.get_paths()["purelib"]) / package for package in PACKAGES]
    sentences = dict.fromkeys(
        sentence
        for root in (Path(sysconfig.get_paths()["stdlib"]), *roots)
        for text in docstring_sentences(root)
        for sentence in text
    )
    shuffled = sorted(sentences)
    random.Random(0).shuffle(shuffled)
    return shuffled


def docstring_sentences(root: Path) -> Iterator[list[str]]:
    """Yield the sentences of every docstring of a package, without its tests."""
    for path in sorted(root.rglob("*.py")):
        if not {"test", "tests", "site-packages"} & set(path.relative_to(root).parts):
            yield from (list(_sentences(text)) for text in _docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # a template, or of another Python
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
            text := ast.get_docstring(node)
        ):
            yield text


@functools.cache
def translated_messages(language: str, catalogues: Path = CATALOGUES) -> list[str]:
    """Return messages of the installed programs in another language, shuffled.

    They are the translations in ``catalogues/LANGUAGE/LC_MESSAGES/*.mo``, the catalogues of GNU gettext that
    Debian's packages bring along. Each is such a sentence as those of ``docstrings``, has no place for an
    argument, and differs from its original. The list is empty where no program has a catalogue.
    """
    found: set[str] = set()
    for path in sorted((catalogues / language / "LC_MESSAGES").glob("*.mo")):
        try:
            with open(path, "rb") as file:
                messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except (OSError, ValueError, LookupError, struct.error):
            continue  # a broken link, another format, or another encoding than it says
        for original, message in messages.items():
            if isinstance(original, str) and original not in ("", message) and "%" not in message:
                found.update(_sentences(message))  # a plural's key is no string
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _sentences(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        for sentence in re.split(r"(?<=[.!?]) +", " ".join(paragraph.split())):
            letters = sum(each.isalpha() or each == " " for each in sentence)
            if (
                40 <= len(sentence) <= 300
                and sentence.count(" ") >= 6
                and sentence[0].isalpha()
                and letters > 0.85 * len(sentence)
            ):
                yield sentence
