"""The text of the reference models: files of paragraphs, and blocks of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.io.atomic import file_checksum, replacing_directory
from embkern.io.checked_json import to_checked_json

from ..installed_text import Document, installed_documents, split
from .kinds import LENGTH, Kind

HELD_OUT_CHARS, TRAIN_CHARS = 160_000, 40_000_000


def write_text(directory: Path, documents: Iterable[Document] | None = None, **sizes: int) -> None:
    """Write ``{train,valid,test}.txt`` and ``text.json``, of the installed documents by default.

    ``sizes`` are those of `split`.
    """
    sizes = {"held_out_chars": HELD_OUT_CHARS, "train_chars": TRAIN_CHARS} | sizes
    splits = split(installed_documents() if documents is None else documents, **sizes)
    facts: dict[str, Any] = {"characters_by_source": dict(splits.sources.most_common())}
    with replacing_directory(directory) as temporary:
        for name, texts in splits.named().items():
            path = temporary / f"{name}.txt"
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            facts[name] = {
                "texts": len(texts), "bytes": path.stat().st_size, "checksum": file_checksum(path)
            }  # fmt: skip
        (temporary / "text.json").write_text(to_checked_json(facts))


def read_lines(path: Path, checksum: str | None = None) -> list[str]:
    """Return the texts of a file of one text a line.

    Raises:
        ValueError: its checksum is another.
    """
    if checksum is not None and (got := file_checksum(path)) != checksum:
        raise ValueError(f"{path} is damaged or edited: expected checksum {checksum}, got {got}")
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def blocks_of(texts: Sequence[str], tokenizer: Any, kind: Kind, most: int | None = None) -> Tensor:
    """Pack texts in their order into rows of ``LENGTH`` ids, ``most`` rows at most; the rest is dropped."""
    first, before, after = (
        tokenizer.convert_tokens_to_ids([each] if each else [])
        for each in (kind.before_block, kind.before_text, kind.after_text)
    )
    size, stream = LENGTH - len(first), list[int]()
    for start in range(0, len(texts), 1000):
        if most is not None and len(stream) >= most * size:
            break
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)
        for ids in batch["input_ids"]:
            stream += [*before, *ids, *after]
    if len(stream) < size:
        raise ValueError(f"texts: expected at least {size} tokens, got {len(stream)}")
    body = torch.tensor(stream[: len(stream) // size * size]).view(-1, size)[:most]
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(len(body), -1), body], 1)


def first_texts(texts: Sequence[str], most: int) -> Iterator[str]:
    """Yield texts until they have ``most`` characters."""
    for text in texts:
        if most <= 0:
            return
        yield text
        most -= len(text)
