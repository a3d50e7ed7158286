"""Stream texts of bounded length from files, directories and data sets."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..io.errors import reason_of

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")  # files that are read in a directory
PIECE_CHARS = 1 << 16  # a longer text is cut: tokenizers need about 100 bytes per character
LARGEST_JSON_LINE = 1 << 26  # characters; a line is read into memory

# NUL indicates a binary file; tokenizers reject lone surrogates.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def read_texts(
    source: str | os.PathLike, *, errors: str = "strict", max_chars: int = PIECE_CHARS
) -> Iterator[str]:
    """Yield the texts of a source: the lines of a text file, the records of a JSON-lines file or a data set.

    Texts of white space alone are skipped. A text longer than ``max_chars`` is cut at white space, or
    anywhere if it has none, and each piece counts as a text.

    Args:
        source: a file of UTF-8 text or JSON lines (``.jsonl``), plain or gzip (``.gz``); or a directory,
            whose files ``*.txt``, ``*.md`` and ``*.jsonl``, plain or gzip, are read in the order of their
            names, subdirectories included; or ``name[:config][:split][:column]`` of the ``datasets`` library,
            which is streamed, such as ``wikitext:wikitext-103-raw-v1`` or ``stanfordnlp/imdb::test``. The
            split is ``train`` by default; the text of a record is its column ``text``, or its only string.
        errors: what to do with bytes that are not UTF-8 text: ``strict`` raises, ``replace`` reads U+FFFD.
        max_chars: longest text, at least 1.

    Raises:
        FileNotFoundError: there is no such file and no such data set.
        ValueError: an argument is out of range, a file is not text or is damaged, or the source has no text;
            the message names the file.
        ImportError: the source is a data set and ``datasets`` is not installed.
        OSError: the connection to a data set is lost.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors: expected strict or replace, got {errors!r}")
    if max_chars < 1:
        raise ValueError(f"max_chars: expected at least 1, got {max_chars}")
    empty = True
    for piece, place in _pieces(source, errors, max_chars):
        if errors == "replace":
            piece = _NOT_TEXT.sub("\ufffd", piece)
        elif found := _NOT_TEXT.search(piece):
            raise ValueError(_not_text(place, f"it holds {found.group()!a}"))
        if piece.strip():
            empty = False
            yield piece
    if empty:
        raise ValueError(f"text: expected some text, found none in {source}")


def _pieces(source: str | os.PathLike, errors: str, max_chars: int) -> Iterator[tuple[str, str]]:
    """Yield the pieces of all texts, each with its place for error messages."""
    path = Path(source)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.name.endswith(SUFFIXES) and each.is_file())
        if not files:
            raise ValueError(f"text: expected files named *{', *'.join(SUFFIXES)} in {source}, found none")
    elif path.exists():
        files = [path]
    elif _is_file_name(source):
        raise FileNotFoundError(f"text: expected a file, a directory or a data set, found none at {source}")
    else:
        for record, column in _data_set(str(source)):
            yield from _cut_record(record, column, str(source), max_chars)
        return
    for file in files:
        yield from _read_file(file, errors, max_chars)


def _is_file_name(source: str | os.PathLike) -> bool:
    """Return whether a source that does not exist is meant as a file rather than a data set."""
    return not isinstance(source, str) or source.startswith((".", "/", "~")) or source.endswith(SUFFIXES)


def _read_file(path: Path, errors: str, max_chars: int) -> Iterator[tuple[str, str]]:
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", errors=errors) as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _read_json_lines(file, path, max_chars)
            else:
                for piece in _cut(file.readline, max_chars):
                    yield piece.removesuffix("\n"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(str(path), str(error))) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"text: {path} is not a complete gzip file ({error})") from None


def _not_text(place: str, reason: str) -> str:
    return f"text: {place} is not UTF-8 text ({reason}); errors='replace' (--errors replace) reads it"


def _read_json_lines(file: TextIO, path: Path, max_chars: int) -> Iterator[tuple[str, str]]:
    number = 0
    while line := file.readline(LARGEST_JSON_LINE):
        number += 1
        place = f"{path}, line {number}"
        if len(line) == LARGEST_JSON_LINE:
            raise ValueError(f"text: {place}: expected fewer than {LARGEST_JSON_LINE:,} characters of JSON")
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text: {place} is not JSON ({error})") from None
        yield from _cut_record(record, None, place, max_chars)


def _cut_record(record: Any, column: str | None, place: str, max_chars: int) -> Iterator[tuple[str, str]]:
    """Yield the pieces of a record's text: the record if it is a string, else the string in a column."""
    if not isinstance(record, str):
        strings = [k for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
        if column is None:
            column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if column not in strings:
            wanted = f"a string {column!r}" if column else "a string 'text', or a single string"
            raise ValueError(f"text: {place}: expected {wanted} in a record, got {strings or type(record)}")
        record = record[column]
    for piece in _cut(io.StringIO(record).read, max_chars):
        yield piece, place


def _cut(read: Callable[[int], str], max_chars: int) -> Iterator[str]:
    """Yield pieces of at most ``max_chars`` characters of what ``read(n)`` returns, cut before white space.

    ``read`` returns at most n characters, or ``""`` at the end; a newline ends a piece.
    """
    rest = ""
    while piece := rest + read(max_chars - len(rest)):
        rest = ""
        if len(piece) == max_chars and piece[-1] != "\n":
            head = piece.rstrip() if piece[-1].isspace() else "".join(piece.rsplit(maxsplit=1)[:-1])
            if head:
                piece, rest = head, piece[len(head) :]
        yield piece


def _data_set(spec: str) -> Iterator[tuple[Any, str | None]]:
    """Yield the records of ``name[:config][:split][:column]``, and the column."""
    name, config, split, column, *more = [part or None for part in spec.split(":")] + [None] * 3
    if name is None or any(more):
        raise ValueError(f"text: expected name[:config][:split][:column] of a data set, got {spec!r}")
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise ImportError(
            f"text: {spec!r} is not a file, and reading a data set needs datasets (pip install datasets)"
        ) from error
    try:
        records = load_dataset(name, config, split=split or "train", streaming=True)
    except Exception as error:  # datasets and the libraries below it raise errors of many types
        raise FileNotFoundError(
            f"text: {spec!r} is neither a file nor a data set that the hub provides: {reason_of(error)}"
        ) from error
    try:
        for record in records:
            yield record, column
    except Exception as error:  # errors of many types, as above
        raise OSError(f"text: reading the data set {spec!r} failed: {reason_of(error)}") from error
