"""Tokens as a reader knows them: text instead of pieces of a vocabulary, special and unused ones marked."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["special", "unused"]
# [unused12] of BERT, <unused12> of Gemma, <|reserved_special_token_12|> of Llama, madeupword0012 of BART.
_UNUSED = re.compile(r"[\[<]\|?(unused|reserved)\w*\|?[\]>]|madeupword\d+", re.IGNORECASE)
# Byte-level vocabularies write each byte as a printable character: those of Latin-1 stand for themselves.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_REST)}


class TokenName(NamedTuple):
    """A token: its text with spaces, or None for a row without a token; and its kind, if it is no text."""

    text: str | None
    kind: Kind | None = None

    def __str__(self) -> str:
        """Return the text with visible spaces and the kind, such as ``␣thru`` and ``[unused7] (unused)``."""
        shown = "no token" if self.text is None else visible(self.text)
        return shown if self.kind is None else f"{shown} ({self.kind})"


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[TokenName]:
    """Return the names of tokens, by id.

    Pieces of byte-level vocabularies are decoded: ``Ġthru`` is ``thru`` after a space, and bytes that are no
    whole character are written as hexadecimal numbers. The ``▁`` of SentencePiece is a space; the ``##`` of
    WordPiece is kept.

    Args:
        tokenizer: a tokenizer of transformers.
        ids: ids, also those beyond its vocabulary.
    """
    ids = list(ids)
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    byte_level = _is_byte_level(tokenizer)
    names = []
    for id in ids:
        piece = tokenizer.convert_ids_to_tokens(id) if id < len(tokenizer) else None
        if piece is None:
            names.append(TokenName(None, "unused"))
        elif _UNUSED.fullmatch(piece):
            names.append(TokenName(piece, "unused"))
        elif id in special or (id in added and added[id].special):
            names.append(TokenName(piece, "special"))
        elif id in added or not byte_level:
            names.append(TokenName(piece.replace("▁", " ")))
        else:
            names.append(TokenName(_decoded(piece)))
    return names


def visible(token: str) -> str:
    """Return a token with visible spaces and control characters, isolated if it runs from right to left."""
    shown = "".join(_visible(character) for character in token) or "∅"
    if unicodedata.category(shown[0]).startswith("M"):
        shown = "◌" + shown
    if any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in shown):
        shown = f"\u2068{shown}\u2069"
    return shown


def _visible(character: str) -> str:
    if character == " ":
        return "␣"
    if unicodedata.category(character)[0] in "CZ":
        return character.encode("unicode_escape", "backslashreplace").decode()
    return character


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the vocabulary has pieces of bytes, by the piece of a space."""
    pieces = tokenizer.tokenize(" a b")
    return any("Ġ" in piece for piece in pieces)


def _decoded(piece: str) -> str:
    """Return the text of a piece of bytes; bytes that are no whole character are written as ``\\\\xe2``."""
    if not all(character in _BYTES for character in piece):
        return piece
    return bytes(_BYTES[character] for character in piece).decode("utf-8", "backslashreplace")
