"""Every op in plain torch: the definition, the oracle of the tests, and the last-resort backend.

The forwards are the formulas that the docstrings promise; run in float64 they are what every kernel is
checked against. The gradients that the kernels compute are written out; the tests hold them to numerical
differentiation. Sums run in fp32 for narrower dtypes (float64 for float64).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_off(function: Callable) -> Callable:
    """Keep autocast from narrowing the products: the result has the factors' dtype, like F.embedding's."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        device_type = first.device.type
        # is_autocast_enabled raises for a device that has no autocast, such as meta. Nothing is compiled for
        # those, and the compiler of torch 2.10 cannot trace the question.
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
        if has_autocast and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return call


@_autocast_off
def gather_project_forward(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    """``scale * (codes[ids] @ basis + offset)``: ids (*), codes (V, r), basis (r, H), offset (H,); (*, H)."""
    rows = F.embedding(ids.reshape(-1), codes)
    # Products of bf16 and fp16 accumulate in fp32; addmm scales and adds the offset before the one rounding.
    if offset is None:
        nothing = rows.new_zeros(())  # beta 0 ignores it
        rows = rows @ basis if scale == 1 else torch.addmm(nothing, rows, basis, beta=0, alpha=scale)
    else:
        rows = torch.addmm(offset, rows, basis, beta=scale, alpha=scale)
    return rows.view(*ids.shape, basis.shape[1])


@_autocast_off
def gather_project_backward(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids of sparse rows, gradients of codes, basis and offset; an unneeded one is an empty tensor.

    ``padding_idx`` -1 means none. With ``sparse`` the gradient of codes has one row per position of ids.
    """
    ids = ids.reshape(-1)
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    if scale != 1:
        grad = grad * scale
    code_ids = ids.new_empty(0, dtype=torch.int64)
    grad_codes = grad_basis = grad_offset = grad.new_empty(0)
    if needs_codes and sparse:
        code_ids, grad_codes = ids.long(), grad @ basis.t()
    elif needs_codes:
        per_position = (grad @ basis.t()).to(accumulation_dtype(codes.dtype))
        grad_codes = torch.zeros_like(codes, dtype=per_position.dtype)
        grad_codes = grad_codes.index_add(0, ids, per_position).to(codes.dtype)
    if needs_basis:
        grad_basis = F.embedding(ids, codes).t() @ grad
    if needs_offset:
        grad_offset = grad.sum(0)
    return code_ids, grad_codes, grad_basis, grad_offset


# The values of the raw ops' `reduction`, in torch's own order.
REDUCTIONS = ("none", "mean", "sum")
NONE, MEAN, SUM = range(3)
# Beyond these, squares of an fp32 row may leave fp32's range: the row is divided by its largest entry first.
_LARGE, _SMALL = 1e10, 1e-10
POWER_BIAS = 1e-10  # of the authors' |x - y| + 1e-10: keeps the gradient of the power term finite


def cosine_mse_forward(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_output: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of output and target that are asked for; an unneeded one is an empty tensor.

    output and target (N, H), row_weight and target_norm (N,) or none, grad_loss of the loss's shape or none
    (ones). The loss is (N,) for reduction none, else a scalar. A term of weight 0 is not computed.
    """
    dtype = accumulation_dtype(output.dtype)
    count, width = output.shape
    y, x = output.to(dtype), target.to(dtype)
    e = y - x
    (y, y_scale), (x, x_scale), (e_scaled, e_scale) = _scaled_rows(y), _scaled_rows(x), _scaled_rows(e)
    y_norm = torch.linalg.vector_norm(y, dim=1)
    x_norm = torch.linalg.vector_norm(x, dim=1) if target_norm is None else target_norm / x_scale
    both_scales = y_scale * x_scale
    clamped = y_norm * x_norm * both_scales < eps
    dot = (x * y).sum(1)
    cosine = torch.where(clamped, dot * both_scales / eps, dot / (y_norm * x_norm))
    root = torch.linalg.vector_norm(e_scaled, dim=1) / math.sqrt(width)  # of the row's MSE, by e_scale
    magnitude = e.abs() + POWER_BIAS

    weight = torch.ones_like(dot) if row_weight is None else row_weight
    if reduction == MEAN:
        weight = weight / (count if row_weight is None else row_weight.sum())
    rows = torch.zeros_like(dot)
    if cosine_weight:
        rows = rows + cosine_weight * (1 - cosine)
    if mse_weight:
        rows = rows + mse_weight * (e_scale * root).square()
    if power_weight:
        rows = rows + power_weight * magnitude.pow(alpha).mean(1)
    rmse = e_scale * root
    if rmse_weight and reduction == MEAN:  # one root for the batch
        largest = e_scale.max() if count else e_scale.sum()
        rmse = largest * (weight * (e_scale / largest * root).square()).sum().sqrt()
    elif rmse_weight:
        rows = rows + rmse_weight * rmse
    rows = weight * rows
    loss = rows if reduction == NONE else rows.sum()
    if count == 0 and reduction == MEAN:
        loss = loss / 0
    if rmse_weight and reduction == MEAN:
        loss = loss + rmse_weight * rmse

    # Per row: d loss / d row of each term, the vectors divided by their scales.
    row = weight if grad_loss is None else weight * grad_loss
    from_error = row * (2 * mse_weight / width)
    error = from_error.unsqueeze(1) * e
    if rmse_weight:  # 1 / rmse may leave the range where e / rmse does not
        of_root = torch.where(rmse == 0, 0.0, e.t() / rmse).t()
        error = error + (row * (rmse_weight / width)).unsqueeze(1) * of_root
    if power_weight:
        slope = (row * (power_weight * alpha / width)).unsqueeze(1) * magnitude.pow(alpha - 1)
        error = error + slope * e.sign()

    def gradient(
        a: Tensor, a_norm: Tensor, a_scale: Tensor, b: Tensor, b_norm: Tensor, b_scale: Tensor
    ) -> Tensor:
        slope = row * cosine_weight
        from_a = torch.where(clamped, 0.0, slope * cosine / (a_norm * a_norm * a_scale))
        from_b = -torch.where(clamped, slope / eps * b_scale, slope / (a_norm * b_norm * a_scale))
        return from_a.unsqueeze(1) * a + from_b.unsqueeze(1) * b

    grad_output = grad_target = output.new_empty(0)
    if needs_output:
        grad = error if not cosine_weight else error + gradient(y, y_norm, y_scale, x, x_norm, x_scale)
        grad_output = grad.to(output.dtype)
    if needs_target:
        grad = -error if not cosine_weight else gradient(x, x_norm, x_scale, y, y_norm, y_scale) - error
        grad_target = grad.to(output.dtype)
    return loss, grad_output, grad_target


def _scaled_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose squares stay in range, and the scale (N,) to multiply them by; 1 for all ordinary rows."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1)
    outside = (largest > _LARGE) | ((largest < _SMALL) & (largest > 0))
    scale = torch.where(outside, largest, 1.0)
    return rows / scale.unsqueeze(1), scale


@_autocast_off
def autoencoder_forward(
    target: Tensor,
    codes: Tensor | None,
    encoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    basis: Tensor,
    offset: Tensor | None,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Terms (4,), and the gradients of codes, encoder_weight, encoder_bias, basis and offset.

    target (N, H); codes (N, r), or encoder_weight (r, H) and encoder_bias (r,) that make them of the target;
    basis (r, H), offset (H,). The terms are the loss, then cosine distance, MSE and power term by themselves,
    reduced alike (the power term is 0 where its weight is). Gradients that do not exist are empty tensors.
    """
    encoded = codes is None
    if encoded:
        assert encoder_weight is not None
        codes = F.linear(target, encoder_weight, encoder_bias)
    assert codes is not None
    output = codes @ basis if offset is None else torch.addmm(offset, codes, basis)

    def loss(weights: tuple[float, float, float, float], needs: bool) -> tuple[Tensor, Tensor]:
        value, grad, _ = cosine_mse_forward(
            output, target, row_weight, target_norm, None, reduction, *weights, alpha, eps, needs, False
        )
        return value, grad

    total, grad = loss((cosine_weight, mse_weight, rmse_weight, power_weight), needs_grad)
    terms = [total, loss((1.0, 0.0, 0.0, 0.0), False)[0], loss((0.0, 1.0, 0.0, 0.0), False)[0]]
    terms.append(loss((0.0, 0.0, 0.0, 1.0), False)[0] if power_weight else torch.zeros_like(total))
    grads = [target.new_empty(0) for _ in range(5)]
    if needs_grad:
        grad_codes = grad @ basis.t()
        if encoded:
            grads[1] = grad_codes.t() @ target
            if encoder_bias is not None:
                grads[2] = grad_codes.sum(0)
        else:
            grads[0] = grad_codes
        grads[3] = codes.t() @ grad
        if offset is not None:
            grads[4] = grad.sum(0)
    return (torch.stack(terms), *grads)  # type: ignore[return-value]


# ---- gather_decode: rows of a packed table -----------------------------------------------------------

GROUP = 32  # values that share the words of a record: bit i of a group's word p is bit p of its value i
_LEVELS_PER_UNIT = 4096
LEVEL_STEP = 1 / _LEVELS_PER_UNIT  # of the levels, which are whole numbers: no model's dtype rounds them
LEVEL_BITS = 4  # codes this wide at most go through a trellis with levels of its own, wider ones are uniform
STATE_BITS = 7  # of a trellis: a value's code and those of the values before it, as far back as they fit
STATES = 2**STATE_BITS


def packed_values(
    ids: Tensor, records: Tensor, directory: Tensor, tiers: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether the rows of ids (N,) are coefficients of the basis (N,), and their values (N, 32 G) in fp32.

    The tensors are those of ``embkern.PackedTable``. A value of ``b`` bits is ``levels[b - 1, state]`` steps,
    ``state`` being that of ``trellis_states``; or ``code - (2**b - 1) / 2`` beyond four bits; 0 where the
    tier has no such group.
    """
    block, lane = ids // GROUP, ids % GROUP
    shifts = torch.arange(0, 32, 4, device=ids.device, dtype=torch.int32)
    tier_of = ((directory[block, 1:].unsqueeze(2) >> shifts) & 15).flatten(1).long()  # of a block's 32 rows
    bits = tiers[:, 1:].long()
    sizes = F.pad(bits.sum(1), (0, 16 - len(tiers)))
    lanes = torch.arange(GROUP, device=ids.device)
    before = torch.where(lanes < lane.unsqueeze(1), sizes[tier_of], 0).sum(1)
    tier = tier_of.gather(1, lane.unsqueeze(1)).squeeze(1)
    transform, bits = tiers[tier, 0].bool(), bits[tier]
    group = (directory[block, 0].long() + before).unsqueeze(1) + bits.cumsum(1) - bits

    code = torch.zeros(*bits.shape, GROUP, dtype=torch.int64, device=ids.device)
    for plane in range(8):
        present = plane < bits
        word = records[torch.where(present, group + plane, 0)]
        bit = (word.unsqueeze(2) >> lanes.to(torch.int32)) & 1
        code += torch.where(present.unsqueeze(2), bit.long() << plane, 0)
    width = bits.unsqueeze(2)
    own = width.clamp(1, LEVEL_BITS)
    chosen = levels.flatten()[(own - 1) * STATES + trellis_states(code, own)].float()
    chosen = chosen / _LEVELS_PER_UNIT  # the compiler of torch 2.10 fails on a global float in a backward
    uniform = code.float() - ((1 << width).float() - 1) / 2
    values = torch.where(width > LEVEL_BITS, uniform, torch.where(width > 0, chosen, 0.0))
    return transform, values.flatten(1)


def trellis_states(code: Tensor, bits: Tensor | int) -> Tensor:
    """What a value is looked up by: its code and those of the values before it, up to 7 bits.

    ``state[i] = (code[i] + (code[i - 1] << bits) + (code[i - 2] << 2 * bits) + ...) % 128`` for codes
    (..., 32) of a group; the code before a group's first value is that of its last one. Every choice of codes
    is a path through a trellis of 128 states, and a value has 128 levels though only ``bits`` are stored for
    it (trellis-coded quantisation: Marcellin and Fischer 1990; levels by a shift register of codes: QTIP,
    arXiv 2406.11235; a path that ends where it begins: tail-biting).
    """
    state, shift = code, torch.as_tensor(bits, device=code.device)
    for before in range(1, STATE_BITS):
        state = state + (code.roll(before, -1) << (before * shift).clamp(max=STATE_BITS))
    return state % STATES


def _unscaled_rows(
    transform: Tensor, values: Tensor, basis: Tensor | None, embedding_dim: int, dtype: torch.dtype
) -> Tensor:
    """Rows (N, H) before their scale and the offset."""
    direct = F.pad(values, (0, max(0, embedding_dim - values.shape[1])))[:, :embedding_dim].to(dtype)
    if basis is None:
        return direct
    return torch.where(transform.unsqueeze(1), _coefficients(values, basis) @ basis.to(dtype), direct)


def _coefficients(values: Tensor, basis: Tensor) -> Tensor:
    size = basis.shape[0]
    return F.pad(values, (0, max(0, size - values.shape[1])))[:, :size].to(accumulation_dtype(basis.dtype))


@_autocast_off
def gather_decode_forward(
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    embedding_dim: int,
    scale: float,
) -> Tensor:
    """``scale * (scales[ids] * rows + offset)``: rows of a packed table, ids (*); (*, H)."""
    flat, dtype = ids.reshape(-1).long(), accumulation_dtype(scales.dtype)
    factor = scales.index_select(0, flat).to(dtype)  # raises where an id is out of range
    transform, values = packed_values(flat, records, directory, tiers, levels)
    rows = _unscaled_rows(transform, values, basis, embedding_dim, dtype) * factor.unsqueeze(1)
    if offset is not None:
        rows = rows + offset.to(dtype)
    return (rows * scale).to(scales.dtype).view(*ids.shape, embedding_dim)


@_autocast_off
def gather_decode_backward(
    grad: Tensor,
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    scale: float,
    padding_idx: int,
    needs_scales: bool,
    needs_basis: bool,
    needs_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scales, basis and offset for grad (N, H); an unneeded one is an empty tensor."""
    flat, dtype = ids.reshape(-1).long(), accumulation_dtype(scales.dtype)
    grad = grad.to(dtype) * scale
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx).unsqueeze(1), 0)
    grad_scales = grad_basis = grad_offset = scales.new_empty(0)
    if needs_scales or needs_basis:
        transform, values = packed_values(flat, records, directory, tiers, levels)
    if needs_scales:
        rows = _unscaled_rows(transform, values, basis, grad.shape[1], dtype)
        per_row = (rows * grad).sum(1)
        grad_scales = torch.zeros_like(scales, dtype=dtype).index_add(0, flat, per_row).to(scales.dtype)
    if needs_basis:
        assert basis is not None
        factor = torch.where(transform, scales[flat].to(dtype), 0.0)
        grad_basis = ((_coefficients(values, basis) * factor.unsqueeze(1)).t() @ grad).to(basis.dtype)
    if needs_offset:
        grad_offset = grad.sum(0).to(scales.dtype)
    return grad_scales, grad_basis, grad_offset


def quantize_rows(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    steps: Tensor,
    factors: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and projections of rows (N, 32 G), value by value, at the best of the factors."""
    squares = values.new_ones(values.shape[1]) if spread is None else spread.square()
    root = values.square().mean(1, keepdim=True).sqrt()
    root = torch.where(root > 0, root, 1.0)
    best = torch.full_like(root[:, 0], -1.0)
    scales = torch.zeros_like(best)
    codes = values.new_zeros((len(values) if needs_codes else 0, values.shape[1]), dtype=torch.uint8)
    for factor in factors.tolist():
        code, decoded = _nearest_levels(values / (root * factor), bits.tolist(), levels, steps.tolist())
        dot, square = (values * decoded) @ squares, decoded.square() @ squares
        projection = dot / square.clamp_min(1e-30).sqrt()
        better = projection > best
        best = torch.where(better, projection, best)
        scales = torch.where(better, dot / square.clamp_min(1e-30), scales)
        if needs_codes:
            codes[better] = code[better]
    return codes, scales, best


def quantize_trellis(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    scales: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and projections of rows (N, 32 G) on trellises, at the best of their scales (N, F)."""
    squares = values.new_ones(values.shape[1]) if spread is None else spread.square()
    best = torch.full_like(values[:, 0], -torch.inf)
    chosen = torch.zeros_like(best)
    codes = values.new_zeros((len(values) if needs_codes else 0, values.shape[1]), dtype=torch.uint8)
    for scale in scales.t():
        scaled = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(1) * values
        code, decoded = [], []
        for width, x, weights in zip(
            bits.tolist(), scaled.split(GROUP, 1), squares.split(GROUP), strict=True
        ):
            own = levels[max(width, 1) - 1].to(values.dtype) * LEVEL_STEP
            states = _best_states(x, weights, own, width) if width else torch.zeros_like(x, dtype=torch.int64)
            code.append(states % 2**width)
            decoded.append(own[states] if width else torch.zeros_like(x))
        y = torch.cat(decoded, 1)
        dot, square = (values * y) @ squares, (y.square() @ squares).clamp_min(1e-30)
        projection = dot / square.sqrt()
        better = projection > best
        best = torch.where(better, projection, best)
        chosen = torch.where(better, dot / square, chosen)
        if needs_codes:
            codes[better] = torch.cat(code, 1).to(torch.uint8)[better]
    return codes, chosen, best


def _best_states(x: Tensor, weights: Tensor, levels: Tensor, bits: int) -> Tensor:
    """States (N, 32) of the paths whose levels are nearest to x (N, 32), by Viterbi's algorithm.

    A path has to end in the state it begins in. Which one is guessed as the state that a path without that
    condition passes there, when the group is turned by half.
    """
    half = GROUP // 2
    free = x.new_zeros(len(x), STATES)
    boundary = _path(x.roll(half, 1), weights.roll(half), levels, bits, free, None)[:, half - 1]
    closed = torch.full_like(free, torch.inf).scatter(1, boundary.unsqueeze(1), 0)
    return _path(x, weights, levels, bits, closed, boundary)


def _path(x: Tensor, weights: Tensor, levels: Tensor, bits: int, cost: Tensor, end: Tensor | None) -> Tensor:
    """States (N, 32) of the cheapest paths, given what it costs (N, 128) to begin, to ``end`` if any."""
    parents, forgotten = STATES >> bits, []
    for value, weight in zip(x.t(), weights.tolist(), strict=True):
        best, which = cost.view(len(x), 1 << bits, parents).min(1)
        error = weight * (value.unsqueeze(1) - levels).square()
        cost = error + best.repeat_interleave(1 << bits, 1)
        forgotten.append(which)
    state = cost.argmin(1) if end is None else end
    states = []
    for which in reversed(forgotten):
        states.append(state)
        kept = state >> bits
        state = which.gather(1, kept.unsqueeze(1)).squeeze(1) * parents + kept
    return torch.stack(states[::-1], 1)


def _nearest_levels(
    values: Tensor, bits: list[int], levels: Tensor, steps: list[float]
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of the nearest levels and what they decode to, group by group."""
    codes, decoded = [], []
    for width, part in zip(bits, values.split(GROUP, 1), strict=True):
        if width == 0:
            code, value = torch.zeros_like(part), torch.zeros_like(part)
        elif width > LEVEL_BITS:
            middle = (2**width - 1) / 2
            code = (part / steps[width] + middle).round().clamp(0, 2**width - 1)
            value = code - middle
        else:
            own = levels[width - 1, : 2**width].to(values.dtype) * LEVEL_STEP
            code = torch.bucketize(part.contiguous(), (own[1:] + own[:-1]) / 2)
            value = own[code]
        codes.append(code.to(torch.uint8))
        decoded.append(value)
    return torch.cat(codes, 1), torch.cat(decoded, 1)
