"""Product quantisation with k-means codebooks by faiss."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..tables.bit_codes import pack_codes, packed_bytes
from ..tables.product import ProductTable, spans
from ..tables.rows import expect_integer
from .base import Options, byte_budget, check_table, parse_options, ratio_error, row_weights
from .storage import narrow_dtype, rounded

TRIAL_ITERATIONS = 4  # of k-means, in the trials that choose rotation, scales and bits
LEAST_WIDTH = 8  # to which sub-vectors are padded: below 5 faiss takes 8 times as long
OPQ_ROUNDS, OPQ_ITERATIONS = 6, 4  # updates of the rotation, and iterations of k-means before each


class ProductQuantizationOptions(Options):
    """Options of ``product_quantization``."""

    bits: Literal[4, 5, 6, 7, 8] | None = Field(None, description="bits of a code; None: the best")
    scales: bool | None = Field(
        None, description="quantise directions and store a scale per row; None: if that is better"
    )
    rotation: Literal["none", "pca", "opq"] | None = Field(
        None,
        description="rotate first: pca balances the variances of the subspaces, opq improves its rotation; "
        "None: pca, if that is better",
    )
    iterations: int = Field(25, ge=1, description="iterations of k-means")
    exponent: float = Field(0.75, ge=0, description="rows weigh as their counts to this power")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of k-means")


class _Design(NamedTuple):
    """The settings that determine the bytes."""

    rotation: str
    scales: bool
    bits: int
    subspaces: int = 0

    def nbytes(self, V: int, H: int) -> int:
        """Return the bytes of codes, codebooks, scales and rotation."""
        floats = min(2**self.bits, V) * H + V * self.scales + H * H * (self.rotation != "none")
        return packed_bytes(V * self.subspaces, self.bits) + 2 * floats


@torch.no_grad()
def product_quantization(
    table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any
) -> ProductTable:
    """Replace sub-vectors of rows by the nearest of 16 to 256 codewords, with a codebook per subspace.

    The columns are split into as many subspaces as the ratio allows, of widths that differ by at most one.
    k-means finds the codewords of each, on rows with weights ``counts ** exponent / (x @ x)``, which makes
    the squared error one of directions. Codewords, scales and rotation are stored in fp16 (bf16 for
    a bf16 table), and all are counted. The scale of a row is ``(x @ y) / (y @ y)``. Rotation, scales and bits
    are chosen, one after another, by the direction error of short runs.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of codes, codebooks, scales and rotation.
        counts: (V,), how often each token is read; None weighs all rows equally.
        options: the fields of ``ProductQuantizationOptions``.

    Raises:
        ImportError: faiss is not installed.
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.

    Source: H. Jégou, M. Douze, C. Schmid, Product quantization for nearest neighbor search (2011);
        T. Ge et al., Optimized product quantization (2013); faiss.
    """
    chosen = parse_options(ProductQuantizationOptions, options, "product_quantization")
    check_table(table)
    budget = byte_budget(table, ratio)
    V, H = table.shape
    weights = V * row_weights(counts, V, chosen.exponent)  # with a mean of 1, as faiss expects counts
    designs, least = [], []
    for rotation, scales, bits in itertools.product(
        [chosen.rotation] if chosen.rotation else ["none", "pca"],
        [True, False] if chosen.scales is None else [chosen.scales],
        [chosen.bits] if chosen.bits else [6, 7, 8, 5, 4],
    ):
        design = _Design(rotation, scales, bits)
        fixed, smallest = (design._replace(subspaces=n).nbytes(V, H) for n in (0, 1))
        least.append(smallest)
        if smallest <= budget:
            designs.append(design._replace(subspaces=min(H, (budget - fixed) * 8 // (V * bits))))
    if not designs:
        raise ratio_error(table, ratio, min(least))
    books = _Codebooks(table.detach().cpu().float(), weights, chosen.seed, narrow_dtype(table))
    best = _best(designs, books.trial)
    return books.quantized(best, chosen.iterations).to(table.device)


@torch.no_grad()
def product_codes(
    table: Tensor, *, subspaces: int, bits: int = 8, iterations: int = 25, seed: int = 0
) -> ProductTable:
    """Quantise the sub-vectors of a table with a codebook per subspace, at a given number of codes.

    As ``product_quantization``, without a ratio: k-means on the squared errors of the sub-vectors, all rows
    weighing alike, no scales and no rotation. The codes are the latent ids of ``embkern.nn.NGrammer``.

    Args:
        table: (V, H).
        subspaces: 1 to H.
        bits: 4 to 8, of a code.
        iterations: of k-means.
        seed: of k-means.

    Raises:
        ImportError: faiss is not installed.
        ValueError, TypeError: an argument is not usable.
    """
    options = {"bits": bits, "iterations": iterations, "seed": seed, "scales": False, "rotation": "none"}
    chosen = parse_options(ProductQuantizationOptions, options, "product_codes")
    check_table(table)
    expect_integer("subspaces", subspaces, 1, table.shape[1])
    books = _Codebooks(
        table.detach().cpu().float(), row_weights(None, len(table)) * len(table), chosen.seed, torch.float32
    )
    books.weights[False] = torch.ones(len(table))
    design = _Design("none", False, bits, subspaces)
    return books.quantized(design, chosen.iterations).to(table.device)


def _best(designs: list[_Design], error: Callable[[_Design], float]) -> _Design:
    """Choose the rotation, then the scales, then the bits, each with the other two fixed."""
    best = designs[0]
    error = functools.cache(error)
    for place in range(3):
        like = [each for each in designs if all(each[i] == best[i] for i in range(3) if i != place)]
        best = min(like, key=error) if len(like) > 1 else best
    return best


class _Found(NamedTuple):
    """Codes (V,), codebooks (K, d) as stored, and faiss's centroids, of each subspace."""

    codes: list[Tensor]
    books: list[Tensor]
    centroids: list[Any]

    def copies(self) -> Tensor:
        """Return the codewords of all rows, (V, H) fp32."""
        return torch.cat([book.float()[codes] for book, codes in zip(self.books, self.codes, strict=True)], 1)


class _Codebooks:
    """Quantises rows (V, H) with codebooks that k-means finds."""

    def __init__(self, rows: Tensor, weights: Tensor, seed: int, dtype: torch.dtype) -> None:
        self.rows, self.seed, self.dtype, self.faiss = rows, seed, dtype, _faiss()
        norms = rows.double().norm(dim=1, keepdim=True)
        norms[norms == 0] = 1  # a row of zeros is its own direction
        self.directions = (rows / norms).float()
        # Weights that make squared errors relative to the squared norms; directions have a norm of 1.
        relative = weights / norms.squeeze(1).square()
        self.weights = {True: weights.float(), False: (relative / relative.mean()).float()}

    def trial(self, design: _Design) -> float:
        """Return the weighted direction error of a short run; opq is tried with its initial rotation."""
        if design.rotation == "opq":
            design = design._replace(rotation="pca")
        copies = self.quantized(design, TRIAL_ITERATIONS).to(torch.float32).to_dense()
        cosine = F.cosine_similarity(self.rows, copies, eps=1e-30)
        return float(self.weights[True].double() @ (1 - cosine).double())

    def quantized(self, design: _Design, iterations: int) -> ProductTable:
        """Quantise the rows with a design."""
        target = self.directions if design.scales else self.rows
        weights, rotation, scales = self.weights[design.scales], None, None
        bounds = spans(target.shape[1], design.subspaces)
        if design.rotation != "none":
            wide = self._rotation(bounds)
            if design.rotation == "opq":
                wide = self._optimised_rotation(wide, target, weights, bounds, design.bits)
            rotation = rounded(wide, self.dtype)
            target = target @ rotation.float()
        found = self._encode(target, weights, bounds, design.bits, iterations)
        if design.scales:
            copies = found.copies() if rotation is None else found.copies() @ rotation.float().t()
            scale = (self.rows * copies).sum(1) / copies.square().sum(1).clamp_min(1e-30)
            scales = rounded(scale, self.dtype)
        return ProductTable(
            torch.cat(found.books, 1),
            pack_codes(torch.stack(found.codes, 1), design.bits),
            scales,
            rotation,
            design.bits,
            design.subspaces,
            num_embeddings=len(self.rows),
            embedding_dim=self.rows.shape[1],
            facts=design._asdict(),
            check=False,
        )

    @functools.cached_property
    def _axes(self) -> tuple[list[float], Tensor]:
        """Variances and principal axes (H, H) of the directions in ascending order."""
        wide = self.directions.double()
        values, vectors = torch.linalg.eigh(wide.t() @ (self.weights[True].double().unsqueeze(1) * wide))
        return values.clamp_min(1e-12 * float(values[-1]) or 1.0).tolist(), vectors

    def _rotation(self, bounds: list[tuple[int, int]]) -> Tensor:
        """Assign the principal axes (H, H) to subspaces so that the products of their variances balance."""
        variances, vectors = self._axes
        assigned: list[list[int]] = [[] for _ in bounds]
        load = [0.0] * len(bounds)
        for axis in reversed(range(len(variances))):  # in descending order
            room = [i for i, (first, last) in enumerate(bounds) if len(assigned[i]) < last - first]
            place = min(room, key=load.__getitem__)
            assigned[place].append(axis)
            load[place] += math.log(variances[axis] / variances[0])
        return vectors[:, [axis for axes in assigned for axis in axes]].float()

    def _optimised_rotation(
        self, rotation: Tensor, target: Tensor, weights: Tensor, bounds: list[tuple[int, int]], bits: int
    ) -> Tensor:
        """Alternate between codebooks for the rotation and the rotation for the codebooks (OPQ)."""
        starts = None
        for _ in range(OPQ_ROUNDS):
            found = self._encode(target @ rotation, weights, bounds, bits, OPQ_ITERATIONS, starts)
            starts, weighted = found.centroids, weights.unsqueeze(1) * found.copies()
            left, _, right = torch.linalg.svd(target.t().double() @ weighted.double())
            rotation = (left @ right).float()
        return rotation

    def _encode(
        self,
        target: Tensor,
        weights: Tensor,
        bounds: list[tuple[int, int]],
        bits: int,
        iterations: int,
        starts: list[Any] | None = None,
    ) -> _Found:
        """Return the nearest codewords of the sub-vectors of a target (V, H), of every subspace."""
        found = _Found([], [], [])
        for number, (first, last) in enumerate(bounds):
            start = starts[number] if starts else None
            self._quantize(target[:, first:last], weights, bits, iterations, start, found)
        return found

    def _quantize(
        self, part: Tensor, weights: Tensor, bits: int, iterations: int, start: Any, found: _Found
    ) -> None:
        """Add the codebook of a subspace and the codes of its sub-vectors (V, d) to what was found."""
        width = part.shape[1]
        points = F.pad(part, (0, max(0, LEAST_WIDTH - width))).contiguous().numpy()
        kmeans = self.faiss.Kmeans(
            points.shape[1],
            min(2**bits, len(points)),
            niter=iterations,
            seed=self.seed,
            min_points_per_centroid=1,  # silences the warning for small tables
        )
        kmeans.train(points, weights=weights.numpy(), init_centroids=start)
        book = rounded(torch.from_numpy(kmeans.centroids), self.dtype)
        nearest = self.faiss.knn(points, book.float().numpy(), 1)[1]
        found.codes.append(torch.from_numpy(nearest).squeeze(1))
        found.books.append(book[:, :width])
        found.centroids.append(kmeans.centroids)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError("product_quantization needs faiss (pip install faiss-cpu)") from error
