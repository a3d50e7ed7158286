"""Read texts from files, directories and data sets as a stream of bounded pieces."""

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

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")  # of the files in a directory


PIECE_CHARS = 1 << 16  # a longer text is cut: tokenizers keep some 100 bytes a character


LARGEST_JSON_LINE = 1 << 26  # characters, in memory at once


_NOT_TEXT = re.compile(
    "[\0\ud800-\udfff]"
)  # NUL: a binary file; half a surrogate pair: no tokenizer takes it


def read_texts(
    source: str | os.PathLike, *, errors: str = "strict", max_chars: int = PIECE_CHARS
) -> Iterator[str]:
    """Yield the texts of a source: the lines of a text file, the records of a JSON-lines file or a data set.

    Texts of white space are left out. One longer than ``max_chars`` is cut at white space, or anywhere if it
    has none, and each piece counts as a text.

    Args:
        source: a file, plain or gzip, UTF-8 text or JSON lines (``.jsonl``, ``.jsonl.gz``); a directory, of
            which all files named ``*.txt``, ``*.md`` and ``*.jsonl``, plain or ``.gz``, are read in order of
            their names; else ``name[:config][:split][:column]`` of the ``datasets`` library, streamed, such
            as ``wikitext:wikitext-103-raw-v1`` or ``stanfordnlp/imdb::test``; the split is ``train`` by
            default. The text of a record is its column ``text``, or its only string.
        errors: of bytes that are not UTF-8 text: ``strict`` raises, ``replace`` reads U+FFFD for them.
        max_chars: of a piece, at least 1.

    Raises:
        FileNotFoundError: there is no such file, or the data set cannot be had.
        ValueError: a file is not text, is damaged, or nothing is in the source; it names the file.
        ImportError: ``datasets`` is not installed.
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
    """Yield the pieces of all texts, each with the place it is from."""
    path = Path(source)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.name.endswith(SUFFIXES) and each.is_file())
        if not files:
            raise ValueError(f"text: expected files named *{', *'.join(SUFFIXES)} in {source}, found none")
    elif path.exists():
        files = [path]
    elif _is_a_file_name(source):
        raise FileNotFoundError(f"text: expected a file, a directory or a data set, found none at {source}")
    else:
        for record, column in _data_set(str(source)):
            yield from _cut_record(record, column, str(source), max_chars)
        return
    for file in files:
        yield from _read_file(file, errors, max_chars)


def _is_a_file_name(source: str | os.PathLike) -> bool:
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
        raise ValueError(_not_text(str(path), str(error))) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"text: {path} is not a whole gzip file ({error})") from error


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
            raise ValueError(f"text: {place} is not JSON ({error})") from error
        yield from _cut_record(record, None, place, max_chars)


def _cut_record(record: Any, column: str | None, place: str, max_chars: int) -> Iterator[tuple[str, str]]:
    """Yield the pieces of the text in a record: a string, or the string in a column of it."""
    if not isinstance(record, str):
        strings = [k for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
        if column is None:
            column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if column not in strings:
            wanted = f"a string {column!r}" if column else "a string 'text', or a single one"
            raise ValueError(f"text: {place}: expected {wanted} in a record, got {strings or type(record)}")
        record = record[column]
    for piece in _cut(io.StringIO(record).read, max_chars):
        yield piece, place


def _cut(read: Callable[[int], str], max_chars: int) -> Iterator[str]:
    """Yield what ``read(n)`` gives, n characters at most; what is cut off is cut before white space."""
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
            f"text: {spec!r} is no file here, and reading a data set needs datasets (pip install datasets)"
        ) from error
    try:
        records = load_dataset(name, config, split=split or "train", streaming=True)
    except Exception as error:  # datasets and its network libraries raise many kinds
        raise FileNotFoundError(
            f"text: {spec!r} is neither a file here nor a data set to be had from the hub: {reason_of(error)}"
        ) from error
    try:
        for record in records:
            yield record, column
    except Exception as error:  # as above
        raise OSError(f"text: the data set {spec!r} could not be read on: {reason_of(error)}") from error
