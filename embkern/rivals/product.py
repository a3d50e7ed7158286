"""Product quantisation with k-means codebooks by faiss, for comparison."""

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

from ..methods.base import Options, byte_budget, check_table, parse_options, ratio_error, row_weights
from .reconstruction import Reconstruction, half, packed_bytes

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

    def parts(self, V: int, H: int) -> dict[str, int]:
        """Return the bytes by name."""
        parts = {
            "codes": packed_bytes(V * self.subspaces, self.bits),
            "books": 2 * min(2**self.bits, V) * H,
            "scales": 2 * V * self.scales,
            "rotation": 2 * H * H * (self.rotation != "none"),
        }
        return {name: size for name, size in parts.items() if size}


@torch.no_grad()
def product_quantization(
    table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any
) -> Reconstruction:
    """Replace sub-vectors of rows by the nearest of 16 to 256 codewords, with a codebook per subspace.

    The columns are split into as many subspaces as the ratio allows, of widths that differ by at most one.
    k-means finds the codewords of each, on rows with weights ``counts ** exponent / (x @ x)``, which makes
    the squared error one of directions. Codewords, scales and rotation are stored in fp16, and all are
    counted. The scale of a row is ``(x @ y) / (y @ y)``. Rotation, scales and bits are chosen, one after
    another, by the direction error of short runs.

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
        fixed, smallest = (sum(design._replace(subspaces=n).parts(V, H).values()) for n in (0, 1))
        least.append(smallest)
        if smallest <= budget:
            designs.append(design._replace(subspaces=min(H, (budget - fixed) * 8 // (V * bits))))
    if not designs:
        raise ratio_error(table, ratio, min(least))
    books = _Codebooks(table.detach().cpu().float(), weights, chosen.seed)
    best = _best(designs, books.trial)
    rows = books.reconstruct(best, chosen.iterations).to(table.device)
    return Reconstruction(rows, best.parts(V, H), best._asdict())


def _best(designs: list[_Design], error: Callable[[_Design], float]) -> _Design:
    """Choose the rotation, then the scales, then the bits, each with the other two fixed."""
    best = designs[0]
    error = functools.cache(error)
    for place in range(3):
        like = [each for each in designs if all(each[i] == best[i] for i in range(3) if i != place)]
        best = min(like, key=error) if len(like) > 1 else best
    return best


class _Codebooks:
    """Quantises rows (V, H) with codebooks that k-means finds."""

    def __init__(self, rows: Tensor, weights: Tensor, seed: int) -> None:
        self.rows, self.seed, self.faiss = rows, seed, _faiss()
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
        cosine = F.cosine_similarity(self.rows, self.reconstruct(design, TRIAL_ITERATIONS), eps=1e-30)
        return float(self.weights[True].double() @ (1 - cosine).double())

    def reconstruct(self, design: _Design, iterations: int) -> Tensor:
        """Quantise the rows with a design and return them decoded, (V, H) fp32."""
        target = self.directions if design.scales else self.rows
        weights = self.weights[design.scales]
        spans = _spans(target.shape[1], design.subspaces)
        if design.rotation == "none":
            copies, _ = self._encode(target, weights, spans, design.bits, iterations)
        else:
            rotation = self._rotation(spans)
            if design.rotation == "opq":
                rotation = self._optimised_rotation(rotation, target, weights, spans, design.bits)
            rotation = half(rotation)
            copies, _ = self._encode(target @ rotation, weights, spans, design.bits, iterations)
            copies = copies @ rotation.t()
        if not design.scales:
            return copies
        scale = (self.rows * copies).sum(1) / copies.square().sum(1).clamp_min(1e-30)
        return half(scale).unsqueeze(1) * copies

    @functools.cached_property
    def _axes(self) -> tuple[list[float], Tensor]:
        """Variances and principal axes (H, H) of the directions in ascending order."""
        wide = self.directions.double()
        values, vectors = torch.linalg.eigh(wide.t() @ (self.weights[True].double().unsqueeze(1) * wide))
        return values.clamp_min(1e-12 * float(values[-1]) or 1.0).tolist(), vectors

    def _rotation(self, spans: list[tuple[int, int]]) -> Tensor:
        """Assign the principal axes (H, H) to subspaces so that the products of their variances balance."""
        variances, vectors = self._axes
        assigned: list[list[int]] = [[] for _ in spans]
        load = [0.0] * len(spans)
        for axis in reversed(range(len(variances))):  # in descending order
            room = [i for i, (first, last) in enumerate(spans) if len(assigned[i]) < last - first]
            place = min(room, key=load.__getitem__)
            assigned[place].append(axis)
            load[place] += math.log(variances[axis] / variances[0])
        return vectors[:, [axis for axes in assigned for axis in axes]].float()

    def _optimised_rotation(
        self, rotation: Tensor, target: Tensor, weights: Tensor, spans: list[tuple[int, int]], bits: int
    ) -> Tensor:
        """Alternate between codebooks for the rotation and the rotation for the codebooks (OPQ)."""
        books = None
        for _ in range(OPQ_ROUNDS):
            copies, books = self._encode(target @ rotation, weights, spans, bits, OPQ_ITERATIONS, books)
            left, _, right = torch.linalg.svd(target.t().double() @ (weights.unsqueeze(1) * copies).double())
            rotation = (left @ right).float()
        return rotation

    def _encode(
        self,
        target: Tensor,
        weights: Tensor,
        spans: list[tuple[int, int]],
        bits: int,
        iterations: int,
        books: list[Any] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Return the target with sub-vectors replaced by their nearest codewords, and the codebooks."""
        starts = books or [None] * len(spans)
        found = [
            self._quantize(target[:, first:last], weights, bits, iterations, start)
            for (first, last), start in zip(spans, starts, strict=True)
        ]
        return torch.cat([copies for copies, _ in found], dim=1), [book for _, book in found]

    def _quantize(
        self, part: Tensor, weights: Tensor, bits: int, iterations: int, start: Any = None
    ) -> tuple[Tensor, Any]:
        """Return the nearest codewords of sub-vectors (V, d), rounded to fp16, and the whole codebook."""
        points = F.pad(part, (0, max(0, LEAST_WIDTH - part.shape[1]))).contiguous().numpy()
        kmeans = self.faiss.Kmeans(
            points.shape[1],
            min(2**bits, len(points)),
            niter=iterations,
            seed=self.seed,
            min_points_per_centroid=1,  # silences the warning for small tables
        )
        kmeans.train(points, weights=weights.numpy(), init_centroids=start)
        book = half(torch.from_numpy(kmeans.centroids))
        nearest = self.faiss.knn(points, book.numpy(), 1)[1]
        return book[torch.from_numpy(nearest).squeeze(1), : part.shape[1]], kmeans.centroids


def _spans(width: int, subspaces: int) -> list[tuple[int, int]]:
    """Return the bounds of the columns of subspaces whose widths differ by at most one."""
    return list(itertools.pairwise(width * i // subspaces for i in range(subspaces + 1)))


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError("product_quantization needs faiss (pip install faiss-cpu)") from error
