"""``NGrammer``: adds embeddings of hashed bigrams of latent ids to the rows of an embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.tensor_format import checksum
from ..tables.bit_codes import codes_of_rows
from ..tables.product import ProductTable
from ..tables.rows import LARGEST, expect_integer, expect_shape

Combine = Literal["add", "concat"]
CHECKED = ("latent_ids", "hashes")  # whose checksums a saved model has
NO_TOKEN = -1  # in place of the id of a preceding token, where there is none
_EPSILON = 1e-5  # of the layer norms
_STD = 0.02  # of the n-gram embeddings at first


class NGrammer(nn.Module):
    """Adds what the preceding token tells to the rows of an embedding, through bigrams of latent ids.

    The columns of a row are split into ``heads`` sub-vectors of d = H / heads columns. Head j has a codebook
    of ``K = 2**bits`` codewords, and ``z[t, j]`` is the codeword of the token at position t, its latent id;
    it depends on the token alone, so that the ids are a table (V, heads). With the bigram
    ``b[t, j] = z[t, j] + K * z[t - 1, j]`` (K in place of ``z[t - 1, j]`` where no token precedes), a hash of
    each head selects one of ``buckets`` embeddings of ``width`` columns::

        e[t, j] = ngrams[j, (multiplier[j] * b[t, j] + offset[j]) % prime[j] % buckets]

        add:    out[t, j] = row[t, j] + LN(e[t, j])
        concat: out[t, j] = cat(LN(row[t, j])[: d - width], LN(e[t, j]))

    Both layer norms are over a head, with a gain and a bias for each of its columns. With ``add`` the gain
    is zero at first, so that a trained model is not changed before it is trained further. ``concat`` is the
    form of the paper, for models that are trained from scratch.

    With a ``decay``, a forward in training mode gives the tokens of the batch the latent ids of their present
    rows, and moves codewords towards the means of the sub-vectors that they stand for. The ids are
    buffers: a lookup in evaluation mode computes none.

    Args:
        num_embeddings: V.
        embedding_dim: H, a multiple of ``heads``.
        heads: number of sub-vectors.
        bits: 1 to 8, of a latent id.
        buckets: n-gram embeddings per head.
        width: columns of an n-gram embedding; H / heads for ``add``, at most H / heads - 1 for ``concat``.
        combine: ``add`` or ``concat``.
        decay: share of the codewords that remains in each step of training; None keeps the latent ids.
        device: of the tensors; on ``meta`` they have no values.

    Raises:
        ValueError: a size is out of range, or sizes contradict each other.

    Source: A. Roy et al., N-Grammer: Augmenting Transformers with latent n-grams, arXiv 2207.06366.
    """

    latent_ids: Tensor
    hashes: Tensor
    codewords: Tensor
    mass: Tensor
    previous: Tensor | None = None  # ids (B, L) of the tokens before those of the next lookup

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        heads: int = 8,
        bits: int = 8,
        buckets: int = 16384,
        width: int | None = None,
        combine: Combine = "add",
        decay: float | None = 0.999,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        expect_integer("num_embeddings", num_embeddings, 1, LARGEST)
        expect_integer("embedding_dim", embedding_dim, 1, LARGEST)
        expect_integer("heads", heads, 1, embedding_dim)
        expect_integer("bits", bits, 1, 8)
        expect_integer("buckets", buckets, 1, LARGEST // heads)
        if embedding_dim % heads:
            raise ValueError(f"heads: expected a divisor of H = {embedding_dim}, got {heads}")
        if combine not in get_args(Combine):
            raise ValueError(f"combine: expected {' or '.join(get_args(Combine))}, got {combine!r}")
        columns = embedding_dim // heads
        if width is None:
            width = columns if combine == "add" else max(1, columns // 4)
        if combine == "add" and width != columns:
            raise ValueError(f"width: expected H / heads = {columns} with combine='add', got {width!r}")
        if combine == "concat":
            expect_integer("width", width, 1, columns - 1)
        if decay is not None and not (isinstance(decay, float) and 0 < decay < 1):
            raise ValueError(f"decay: expected a number between 0 and 1, or None, got {decay!r}")
        self.num_embeddings, self.embedding_dim, self.heads, self.bits = (
            num_embeddings,
            embedding_dim,
            heads,
            bits,
        )
        self.buckets, self.width, self.decay = buckets, width, decay
        self.combine: Combine = combine
        K = 2**bits
        self.ngrams = nn.Parameter(torch.empty(heads * buckets, width, device=device))
        self.ngram_gain = nn.Parameter(torch.empty(heads, width, device=device))
        self.ngram_shift = nn.Parameter(torch.empty(heads, width, device=device))
        if combine == "concat":
            self.row_gain = nn.Parameter(torch.empty(heads, columns - width, device=device))
            self.row_shift = nn.Parameter(torch.empty(heads, columns - width, device=device))
        self.register_buffer(
            "latent_ids", torch.zeros(num_embeddings, heads, dtype=torch.uint8, device=device)
        )
        self.register_buffer("hashes", torch.zeros(heads, 3, dtype=torch.int64, device=device))
        if decay is not None:
            self.register_buffer("codewords", torch.zeros(K, embedding_dim, device=device))
            self.register_buffer("mass", torch.zeros(heads, K, device=device))

    def settings(self) -> dict[str, Any]:
        """Return the arguments from which a layer of the same shapes is made, as JSON values."""
        names = (
            "num_embeddings", "embedding_dim", "heads", "bits", "buckets", "width", "combine", "decay",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def initialize(self, codes: ProductTable, *, scale: float = 1.0, seed: int = 0) -> None:
        """Take the latent ids and codewords of a table, and draw hashes and n-gram embeddings.

        Args:
            codes: product quantisation (V, H) of the embedding's rows with ``heads`` subspaces of ``bits``
                bits, without scales and rotation.
            scale: root mean square of the embedding's values, which ``concat`` gives its output.
            seed: of the hashes and the n-gram embeddings.

        Raises:
            ValueError: the table has other sizes, or scales or a rotation.
        """
        asked = (self.num_embeddings, self.embedding_dim, self.heads, self.bits)
        got = (codes.num_embeddings, codes.embedding_dim, codes.subspaces, codes.bits)
        if got != asked or codes.scales is not None or codes.rotation is not None:
            raise ValueError(
                f"codes: expected (V, H, subspaces, bits) of {asked} without scales and rotation, got {got}"
            )
        ids = torch.arange(self.num_embeddings, device=codes.device)
        latent = codes_of_rows(codes.packed_codes, ids, self.heads, self.bits)
        self.latent_ids.copy_(latent)
        if self.decay is not None:
            self.codewords[: len(codes.codebooks)] = codes.codebooks.to(self.codewords)
            counted = [column.long().bincount(minlength=2**self.bits) for column in latent.unbind(1)]
            self.mass.copy_(torch.stack(counted) / self.num_embeddings)
        generator = torch.Generator().manual_seed(seed)
        self.hashes.copy_(_drawn_hashes(self.heads, 2**self.bits, self.buckets, generator))
        self.ngrams.copy_(torch.randn(self.ngrams.shape, generator=generator) * _STD)
        self.ngram_gain.fill_(scale if self.combine == "concat" else 0.0)
        self.ngram_shift.zero_()
        if self.combine == "concat":
            self.row_gain.fill_(scale)
            self.row_shift.zero_()

    def description(self) -> dict[str, Any]:
        """Return what a saved model's config has: settings, and checksums of the integer tensors."""
        sums = {name: checksum(getattr(self, name)) for name in CHECKED if not getattr(self, name).is_meta}
        return {**self.settings(), "checksums": sums}

    @classmethod
    def from_description(cls, described: Any, device: str) -> NGrammer:
        """Return a layer without values; raise ValueError if the description is damaged."""
        try:
            fields = dict(described)
            sums = fields.pop("checksums", {})
            if not isinstance(sums, dict) or not all(type(each) is str for each in sums.values()):
                raise ValueError(f"checksums: expected texts by name, got {sums!r}")
            return cls(**fields, device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config.ngrammer is damaged: {error}") from None

    def validate(self) -> None:
        """Raise ValueError unless latent ids and hashes, as read from a file, are in range."""
        if self.latent_ids.is_meta:
            return
        expect_shape("latent_ids", self.latent_ids, (self.num_embeddings, self.heads))
        expect_shape("hashes", self.hashes, (self.heads, 3))
        if int(self.latent_ids.max()) >= 2**self.bits:
            raise ValueError(
                f"latent_ids: expected ids below {2**self.bits}, got {int(self.latent_ids.max())}"
            )
        if bool((self.hashes[:, 2] < 1).any()) or bool((self.hashes < 0).any()):
            raise ValueError("hashes: expected positive moduli, and factors of at least 0")

    def forward(self, ids: Tensor, rows: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return the rows with what the preceding tokens tell: (``*``, L, H), in the dtype of the rows.

        Args:
            ids: (``*``, L), int32 or int64.
            rows: their rows, (``*``, L, H).
            previous: the ids of the tokens before them, (``*``, L), -1 for none; None: those in ``ids``
                before them, and none before the first.

        Raises:
            ValueError: the shapes do not fit each other.
            IndexError: an id is not below V (on CPU; on CUDA a device-side assertion).
        """
        expect_shape("rows", rows, (*ids.shape, self.embedding_dim))
        expect_shape("previous", previous, ids.shape)
        if previous is None:
            previous = shifted(ids)
        if self.training and self.decay is not None:
            self._follow(ids, rows)
        found = F.embedding(self.places(ids, previous), self.ngrams)
        added = F.layer_norm(found.float(), (self.width,), eps=_EPSILON) * self.ngram_gain + self.ngram_shift
        split = rows.unflatten(-1, (self.heads, -1))
        if self.combine == "add":
            total: Tensor = (split + added.to(rows.dtype)).flatten(-2)
            return total
        normed = F.layer_norm(split.float(), (split.shape[-1],), eps=_EPSILON)
        kept = normed[..., : -self.width] * self.row_gain + self.row_shift
        return torch.cat([kept, added], -1).flatten(-2).to(rows.dtype)

    def places(self, ids: Tensor, previous: Tensor) -> Tensor:
        """Return the rows of ``ngrams`` for ids and those before them, (``*``, L) each: (``*``, L, heads)."""
        K = 2**self.bits
        latent = self.latent_ids[ids.long()].long()
        before = self.latent_ids[previous.long().clamp_min(0)].long()
        before = before.masked_fill((previous < 0).unsqueeze(-1), K)
        multiplier, offset, prime = self.hashes.unbind(1)
        hashed = (multiplier * (latent + K * before) + offset) % prime % self.buckets
        places: Tensor = hashed + self.buckets * torch.arange(self.heads, device=hashed.device)
        return places

    @torch.no_grad()
    def _follow(self, ids: Tensor, rows: Tensor) -> None:
        """Give tokens the latent ids of their present rows, and let the codewords follow these rows."""
        distinct, places = ids.reshape(-1).long().unique(return_inverse=True)
        first = torch.full_like(distinct, ids.numel()).scatter_reduce_(
            0, places, torch.arange(ids.numel(), device=ids.device), "amin"
        )
        if not len(first):
            return
        parts = rows.detach().reshape(-1, self.embedding_dim)[first].float().view(len(first), self.heads, -1)
        share = places.bincount(minlength=len(distinct)).float() / ids.numel()
        assert self.decay is not None
        new = 1 - self.decay
        for head, part in enumerate(parts.unbind(1)):
            columns = slice(head * part.shape[1], (head + 1) * part.shape[1])
            words, mass = self.codewords[:, columns].float(), self.decay * self.mass[head].float()
            nearest = (words.square().sum(1) - 2 * part @ words.t()).argmin(1)
            self.latent_ids[distinct, head] = nearest.to(torch.uint8)
            total = mass.unsqueeze(1) * words
            total.index_add_(0, nearest, part * (new * share).unsqueeze(1))
            mass = mass.index_add(0, nearest, new * share)
            known = mass > 0
            self.codewords[known, columns] = (total[known] / mass[known].unsqueeze(1)).to(
                self.codewords.dtype
            )
            self.mass[head] = mass.to(self.mass.dtype)

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def shifted(ids: Tensor) -> Tensor:
    """Return the ids before those of a sequence (``*``, L), ``NO_TOKEN`` before the first."""
    return F.pad(ids, (1, 0), value=NO_TOKEN)[..., : ids.shape[-1]]


def _drawn_hashes(heads: int, K: int, buckets: int, generator: torch.Generator) -> Tensor:
    """Return a multiplier, an offset and a prime modulus of each head: (heads, 3) int64.

    The functions ``(multiplier * b + offset) % prime % buckets`` are universal: two of the ``K * (K + 1)``
    bigrams share a bucket for about one in ``buckets`` of them (Carter and Wegman, 1979).
    """
    primes, found = _primes(max(K * (K + 1), buckets)), []
    for _ in range(heads):
        prime = next(primes)
        multiplier = int(torch.randint(1, prime, (), generator=generator))
        found.append([multiplier, int(torch.randint(0, prime, (), generator=generator)), prime])
    return torch.tensor(found)


def _primes(least: int) -> Iterator[int]:
    """Yield the primes from ``least`` on."""
    number = max(2, least)
    while True:
        if all(number % each for each in range(2, math.isqrt(number) + 1)):
            yield number
        number += 1
