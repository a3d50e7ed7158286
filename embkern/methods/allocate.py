"""Rate allocation: every row gets the bits that pay, quantised in its own space or in a shared basis.

A model feels the direction error of the tokens it reads. So with weights ``w_i = p_i ** exponent`` of the
tokens' frequencies::

    min over t of  sum_i w_i (1 - cos(x_i, y_i(t_i)))   with  sum_i bytes(t_i) + shared bytes <= budget

For a multiplier lambda every row chooses by itself, ``argmin_t w_i (1 - cos) + lambda bytes(t)``; bisection
finds the lambda that spends the budget. It is reverse water-filling with rows in the place of components:
rare tokens get a few words, frequent ones 4 to 8 bits a value.

A row is represented at one of a few rates (tiers):

- its own values at 1 to 8 bits, at the Lloyd-Max levels of a normal distribution, for rows read often: no
  product is needed to look them up;
- coefficients of an orthonormal basis that all such rows share, at 0 to 4 bits a group of 32, dealt by the
  groups' variances (reverse water-filling once more): half the error of plain rows at 1 bit a value, and the
  only way to go below.

Either has a scale per row, searched so that the codes' direction is the best, and stored so that the row's
projection has its length.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..ops.quantize_rows import quantize_rows
from ..ops.reference import GROUP, LEVEL_BITS, LEVEL_STEP, packed_values
from ..packed import MAX_TIERS, PackedTable, Tier, pack, packed_bytes
from .base import Options, Rows, blocks, check_table, parse_options

ROW_BITS = (8, 6, 4, 3, 2, 1)
COEFFICIENT_BITS = LEVEL_BITS
# Rates of coefficients, in words a row; as far as twice as many as there are groups of values.
RATES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
BASIS_SHARE = 0.05  # of the budget, for the basis, which every row of coefficients is multiplied with
# Scales tried for a row, times its root mean square: few to compare tiers, more for the codes that are kept.
# The large ones are for rows with outliers, as the most frequent tokens tend to be: the full stop of
# all-MiniLM-L6-v2 has a value of 14.6 root mean squares.
COARSE_SCALES = (0.9, 1.0, 1.15, 1.5, 2.0, 2.8, 4.0)
FINE_SCALES = (
    *(0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.22, 1.3, 1.4),
    *(1.5, 1.75, 2.0, 2.4, 2.8, 3.4, 4.0, 5.0, 6.5),
)
# Steps of uniform codes of a standard normal variable that make the squared error least (Max 1960).
UNIFORM_STEPS = {5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
# Squared error of Lloyd-Max codes of so many bits of a standard normal variable.
DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497)


class AllocateOptions(Options):
    """Options of ``allocate``."""

    exponent: float = Field(0.5, ge=0, le=1, description="rows weigh their frequency to this power")
    tiers: int = Field(6, ge=1, le=16, description="rates that rows may choose from")
    floor: float | None = Field(None, gt=0, lt=1, description="least cosine of any row with the original")


@torch.no_grad()
def allocate(table: Rows, *, ratio: float, counts: Tensor | None = None, **options: Any) -> PackedTable:
    """Quantise every row at the rate that its token's frequency pays for, within a budget of bytes.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of everything that replaces it.
        counts: (V,), how often each token is read, absolute or relative, smoothed; None: all alike.
        options: the fields of ``AllocateOptions``.

    Returns:
        A packed table with fp16 scales and basis (bf16 for a bf16 table, fp32 where fp16 has not the range).

    Raises:
        ValueError, TypeError: the ratio cannot be met, with the floor if one is given (the message names the
            highest that can), or an argument is not usable.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3); Lagrangian
    allocation after Shoham and Gersho (1988); Lloyd-Max levels: Max (1960).
    """
    chosen = parse_options(AllocateOptions, options, "allocate")
    check_table(table)
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {ratio}")
    weights = row_weights(counts, len(table), chosen.exponent)
    rows = torch.cat([each.to("cpu", torch.float32) for each in blocks(table)])
    return _Allocation(rows, weights, table.dtype, chosen).within(rows.numel() * table.dtype.itemsize, ratio)


def row_weights(counts: Tensor | None, num_embeddings: int, exponent: float) -> Tensor:
    """Weights (V,) float64 of rows, of sum 1: ``p ** exponent`` of the frequencies p.

    Raises:
        ValueError: counts have another shape, a negative or no positive entry.
    """
    if counts is None:
        return torch.full((num_embeddings,), 1 / num_embeddings, dtype=torch.float64)
    if tuple(counts.shape) != (num_embeddings,):
        raise ValueError(f"counts: expected shape ({num_embeddings},), got {tuple(counts.shape)}")
    wide = counts.detach().to("cpu", torch.float64)
    if not (torch.isfinite(wide).all() and (wide >= 0).all() and wide.sum() > 0):
        raise ValueError("counts: expected finite numbers of at least 0, one of them positive")
    weights = (wide / wide.sum()).pow(exponent)
    return weights / weights.sum()


@functools.cache
def gaussian_levels() -> Tensor:
    """Levels (2, 4, 16) of the packed format: those of Lloyd and Max for a normal distribution."""
    levels = torch.zeros(2, LEVEL_BITS, 16, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    for bits in range(1, LEVEL_BITS + 1):
        count = 2**bits
        values = torch.linspace(-1, 1, count, dtype=torch.float64) * math.sqrt(2 * bits)
        for _ in range(500):  # converges long before
            edges = F.pad((values[1:] + values[:-1]) / 2, (1, 1), value=math.inf)
            edges[0] = -math.inf
            density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
            values = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
        levels[:, bits - 1, :count] = values
    return (levels / LEVEL_STEP).round().to(torch.int16)


class _Allocation:
    """A table's rows, weights and candidate tiers, and the search among them."""

    def __init__(self, rows: Tensor, weights: Tensor, dtype: torch.dtype, options: AllocateOptions) -> None:
        self.rows, self.weights, self.options = rows, weights, options
        self.norms = torch.linalg.vector_norm(rows, dim=1)
        self.groups = -(-rows.shape[1] // GROUP)
        self.dtype = _float_dtype(self.norms, rows.shape[1], dtype)
        padded = F.pad(rows, (0, self.groups * GROUP - rows.shape[1]))
        self.plain = _Space(padded, None, self.norms, transform=False)

    def within(self, table_bytes: int, ratio: float) -> PackedTable:
        """Return the table packed into at most 1/ratio of its bytes."""
        budget = int(table_bytes / ratio)
        tiers = [Tier(False, (bits,) * self.groups) for bits in ROW_BITS]
        spaces = [self.plain for _ in tiers]
        basis, coefficients = self._basis(budget)
        if coefficients is not None:
            profiles = _profiles(coefficients.spread)
            tiers, spaces = tiers + profiles, spaces + [coefficients for _ in profiles]
        errors = torch.stack([s.direction_error(t) for s, t in zip(spaces, tiers, strict=True)], 1)
        search = _Search(errors.double(), self.weights, tiers, self._shared_bytes, self.options)
        kept, choice = search.within(table_bytes, ratio)
        tiers, spaces = [tiers[i] for i in kept], [spaces[i] for i in kept]
        size = GROUP * max((len(tier.bits) for tier in tiers if tier.transform), default=0)
        packed = self._packed(choice, tiers, spaces, None if size == 0 else basis[:size])
        return packed if size == 0 else self._refitted(packed)

    def _basis(self, budget: int) -> tuple[Tensor, _Space | None]:
        """Basis (K, H) of the rows that are read less, times its coefficients' spread, and that space."""
        width, share = self.rows.shape[1], BASIS_SHARE * budget / GROUP / self.dtype.itemsize
        size = GROUP * min(self.groups, round(share / width))
        if size == 0:
            return self.rows[:0], None
        order = self.weights.argsort(descending=True, stable=True)
        read_often = torch.zeros_like(self.weights, dtype=torch.bool)
        read_often[order] = self.weights[order].cumsum(0) < 0.5  # they will keep their own values
        weights = torch.where(read_often, 0.0, self.weights).sqrt().float()
        directions = self.rows / torch.where(self.norms > 0, self.norms, 1.0).unsqueeze(1)
        total = torch.zeros(width, width, dtype=torch.float64)
        for part, weight in zip(directions.split(_BLOCK), weights.split(_BLOCK), strict=True):
            weighted = part * weight.unsqueeze(1)
            total += (weighted.t() @ weighted).double()
        values, vectors = torch.linalg.eigh(total)
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size].float()
        spread = (values / weights.double().square().sum()).sqrt().float()
        spread = F.pad(spread, (0, size - len(spread)))
        inverse = torch.where(spread > spread.max() * 1e-4, 1 / spread, 0.0)
        vectors = F.pad(vectors, (0, size - vectors.shape[1]))
        coefficients = torch.cat([part @ vectors for part in self.rows.split(_BLOCK)]) * inverse
        return vectors.t() * spread.unsqueeze(1), _Space(coefficients, spread, self.norms, transform=True)

    def _shared_bytes(self, tiers: list[Tier]) -> int:
        """Bytes of everything but the records."""
        size = GROUP * max((len(tier.bits) for tier in tiers if tier.transform), default=0)
        rows = torch.zeros(len(tiers), dtype=torch.int64)
        rows[0] = len(self.rows)
        record = 4 * len(self.rows) * tiers[0].words
        return packed_bytes(rows, tiers, self.dtype.itemsize, size, self.rows.shape[1]) - record

    def _packed(
        self, choice: Tensor, tiers: list[Tier], spaces: list[_Space], basis: Tensor | None
    ) -> PackedTable:
        codes, scales = {}, torch.zeros(len(self.rows))
        for index, (tier, space) in enumerate(zip(tiers, spaces, strict=True)):
            ids = torch.nonzero(choice == index).flatten()
            codes[index], scales[ids] = space.encode(tier, ids)
        return pack(
            choice,
            codes,
            tiers,
            gaussian_levels(),
            scales.to(self.dtype),
            None if basis is None else basis.to(self.dtype),
            None,
            self.rows.shape[1],
        )

    def _refitted(self, packed: PackedTable) -> PackedTable:
        """The table with the basis that suits its codes best, by weighted least squares on unit rows.

        Rows of coarse codes want it shorter than the projection that the codes were made for. Then each of
        these rows gets the scale of its projection. Kept if the weighted direction error falls, and the floor
        holds.
        """
        assert packed.basis is not None
        size = len(packed.basis)
        coefficients = packed.tiers[packed.tier_of_rows(), 0].bool() & (self.norms > 0)
        parts = [ids for ids in torch.nonzero(coefficients).flatten().split(_BLOCK) if len(ids)]
        gram = torch.zeros(size, size, dtype=torch.float64)
        moment = torch.zeros(size, self.rows.shape[1], dtype=torch.float64)
        for ids in parts:
            values = self._coefficients(packed, ids)
            weighted = (
                values * (self.weights[ids] / self.norms[ids].double().square()).unsqueeze(1).float()
            ).t()
            gram += (weighted @ values).double()
            moment += (weighted @ self.rows[ids]).double()
        diagonal = gram.diagonal()
        ridge = torch.where(
            diagonal > 0, 1e-6 * diagonal.mean(), 1.0
        )  # an unused coefficient gets a row of zeros
        basis = torch.linalg.solve(gram + torch.diag(ridge), moment).to(self.dtype).contiguous()
        scales, gained, worst = packed.scales.clone(), 0.0, 1.0
        for ids in parts:
            values, x = self._coefficients(packed, ids), self.rows[ids]
            y = values @ basis.float()
            factor = (x * y).sum(1) / y.square().sum(1).clamp_min(1e-30)
            scales[ids] = (packed.scales[ids].float() * factor).to(self.dtype)
            before = F.cosine_similarity(x, values @ packed.basis.float(), eps=1e-30)
            after = F.cosine_similarity(x, y, eps=1e-30)
            gained += float((self.weights[ids] * (after - before).double()).sum())
            worst = min(worst, float(after.min()))
        if gained <= 0 or worst < (self.options.floor or -1):
            return packed
        return dataclasses.replace(packed, basis=basis, scales=scales)

    def _coefficients(self, packed: PackedTable, ids: Tensor) -> Tensor:
        """Decoded coefficients (n, K) of rows, times their scale."""
        assert packed.basis is not None
        codes = (packed.records, packed.directory, packed.tiers, packed.levels)
        values = packed_values(ids, *codes)[1][:, : len(packed.basis)]
        values = F.pad(values, (0, len(packed.basis) - values.shape[1]))
        return values * packed.scales[ids].float().unsqueeze(1)


def _float_dtype(norms: Tensor, width: int, dtype: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that holds the scales of rows with these norms."""
    if dtype == torch.bfloat16:
        return dtype
    present, fp16 = norms[norms > 0], torch.finfo(torch.float16)
    steps = math.sqrt(width) / UNIFORM_STEPS[8]  # norm of a row of the smallest steps
    fits = len(present) == 0 or (
        float(present.min()) / steps > fp16.tiny and float(present.max()) < fp16.max / 8
    )
    return torch.float16 if fits else torch.float32


def _profiles(spread: Tensor | None) -> list[Tier]:
    """Tiers of coefficients: the bits of each group, dealt where they lower the error most."""
    assert spread is not None
    groups = len(spread) // GROUP
    energy = spread.double().square().view(groups, GROUP).sum(1).tolist()
    bits, tiers = [0] * groups, []
    for words in range(1, COEFFICIENT_BITS * groups + 1):
        gains = [
            energy[g] * (DISTORTION[b] - DISTORTION[b + 1]) if b < COEFFICIENT_BITS else -1.0
            for g, b in enumerate(bits)
        ]
        bits[max(range(groups), key=gains.__getitem__)] += 1
        if words in RATES and words <= 2 * groups:
            used = max(g + 1 for g, b in enumerate(bits) if b)
            tiers.append(Tier(True, tuple(bits[:used])))
    return tiers


class _Search:
    """The choice of a tier for every row, and of the tiers to choose from."""

    def __init__(
        self,
        errors: Tensor,
        weights: Tensor,
        tiers: list[Tier],
        shared_bytes: Callable[[list[Tier]], int],
        options: AllocateOptions,
    ) -> None:
        self.tiers, self.shared_bytes, self.options = tiers, shared_bytes, options
        self.cost = errors.clamp_min(0) * weights.unsqueeze(1)
        self.bytes = torch.tensor([4.0 * tier.words for tier in tiers], dtype=torch.float64)
        if options.floor is not None:
            allowed = 1 - errors >= options.floor
            if not bool(allowed.any(1).all()):
                least = float((1 - errors).amax(1).min())
                raise ValueError(
                    f"floor: expected at most {math.floor(least * 1e4) / 1e4}, the worst row's cosine at its "
                    f"best, got {options.floor}"
                )
            self.cost = torch.where(allowed, self.cost, math.inf)

    def within(self, table_bytes: int, ratio: float) -> tuple[list[int], Tensor]:
        """Return the tiers to keep and the choice (V,) among them that spends the budget."""
        budget, kept = int(table_bytes / ratio), list(range(len(self.tiers)))
        if self._least(kept) > budget:
            self._refuse(table_bytes, ratio)
        price = self._price(kept, budget)
        while (
            len(kept) > self.options.tiers
            and (dropped := self._cheapest_to_drop(kept, price, budget)) is not None
        ):
            kept.remove(dropped)
        if len(kept) > MAX_TIERS:
            self._refuse(table_bytes, ratio)
        while True:
            choice = self._filled(kept, budget)
            used = torch.unique(choice)
            if len(used) == len(kept):
                return kept, choice
            kept = [kept[i] for i in used.tolist()]  # and again, with what the others would have shared

    def _least(self, kept: list[int]) -> float:
        """Bytes that these tiers need at least."""
        size = torch.where(torch.isfinite(self.cost[:, kept]), self.bytes[kept], math.inf)
        return float(size.amin(1).sum()) + self.shared_bytes([self.tiers[i] for i in kept])

    def _refuse(self, table_bytes: int, ratio: float) -> None:
        plain = [i for i, tier in enumerate(self.tiers) if not tier.transform]
        least = min(self._least(list(range(len(self.tiers)))), self._least(plain))
        highest = math.floor(table_bytes / least * 1000) / 1000
        floor = "" if self.options.floor is None else f" with floor {self.options.floor:g}"
        raise ValueError(
            f"ratio: {ratio:g} leaves no room for every row{floor}; the highest that "
            f"fits is {highest:g}" + ("" if highest >= 1 else ", so the table cannot be made smaller")
        )

    def _choice(self, kept: list[int], price: float) -> Tensor:
        return (self.cost[:, kept] + price * self.bytes[kept]).argmin(1)

    def _spent(self, kept: list[int], choice: Tensor) -> float:
        return float(self.bytes[kept][choice].sum()) + self.shared_bytes([self.tiers[i] for i in kept])

    def _price(self, kept: list[int], budget: int) -> float:
        """The least multiplier, to a part in a million, at which the choice fits the budget."""
        low, high = 0.0, 1e-9
        while self._spent(kept, self._choice(kept, high)) > budget:
            low, high = high, high * 8
        if low == 0.0 and self._spent(kept, self._choice(kept, 0.0)) <= budget:
            return 0.0
        while high > low * (1 + 1e-6):
            middle = math.sqrt(low * high) if low else high / 8
            if middle < 1e-30:
                break
            fits = self._spent(kept, self._choice(kept, middle)) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return high

    def _cheapest_to_drop(self, kept: list[int], price: float, budget: int) -> int | None:
        """The tier without which the Lagrangian rises least, among those that are not needed to fit."""
        value = self.cost[:, kept] + price * self.bytes[kept]
        two = value.topk(2, dim=1, largest=False)
        rise = torch.zeros(len(kept), dtype=torch.float64)
        rise.index_add_(0, two.indices[:, 0], two.values[:, 1] - two.values[:, 0])
        everything = self.shared_bytes([self.tiers[i] for i in kept])
        for position, index in enumerate(kept):
            without = [self.tiers[i] for i in kept if i != index]
            rise[position] += price * (self.shared_bytes(without) - everything)
        for position in rise.argsort().tolist():
            if self._least([i for i in kept if i != kept[position]]) <= budget:
                return kept[position]
        return None

    def _filled(self, kept: list[int], budget: int) -> Tensor:
        """The choice at the price of the budget, with what is left of it spent on the rows that gain most."""
        price = self._price(kept, budget)
        choice = self._choice(kept, price)
        richer = self._choice(kept, price * (1 - 1e-5))
        more = (self.bytes[kept][richer] - self.bytes[kept][choice]).clamp_min(0)
        rows = torch.nonzero(more > 0).flatten()
        cost = self.cost[:, kept]
        gain = (cost.gather(1, choice[:, None]) - cost.gather(1, richer[:, None])).squeeze(1)
        rows = rows[(gain[rows] / more[rows]).argsort(descending=True, stable=True)]
        room = budget - self._spent(kept, choice)
        upgraded = rows[more[rows].cumsum(0) <= room]
        choice[upgraded] = richer[upgraded]
        return choice


@dataclass
class _Space:
    """Where a tier's values live: the rows themselves, or coefficients of a basis divided by their spread."""

    values: Tensor  # (V, width), zero beyond the row
    spread: Tensor | None  # (width,), None for ones
    norms: Tensor  # (V,) of the rows
    transform: bool

    def direction_error(self, tier: Tier) -> Tensor:
        """1 - cos (V,) of every row at a tier."""
        ids = torch.arange(len(self.values)).split(_BLOCK)
        projections = torch.cat([self._quantized(part, tier, COARSE_SCALES, False)[2] for part in ids])
        return torch.where(self.norms > 0, 1 - projections / self.norms, 0.0)

    def encode(self, tier: Tier, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (n, 32 groups) uint8 and scales (n,) of rows, the best of the finer search."""
        parts = [self._quantized(part, tier, FINE_SCALES, True) for part in ids.split(_BLOCK)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _quantized(
        self, ids: Tensor, tier: Tier, factors: tuple[float, ...], needs_codes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = GROUP * len(tier.bits)
        return quantize_rows(
            self.values[ids, :width],
            None if self.spread is None else self.spread[:width],
            torch.tensor(tier.bits, dtype=torch.uint8),
            gaussian_levels()[int(tier.transform)],
            torch.tensor([UNIFORM_STEPS.get(bits, 1.0) for bits in range(9)]),
            torch.tensor(factors),
            needs_codes=needs_codes,
        )


_BLOCK = 4096
