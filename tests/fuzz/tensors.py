"""Tensors of drawn shapes, values and strides, and checks of what a call returns or raises for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
# Memory layouts. "expanded" repeats one row with stride 0, "overlapping" is a sliding window, "negated" is a
# view with torch's negative bit, whose memory holds the values with the opposite sign.
LAYOUTS = ("narrowed", "stepped", "transposed", "padded", "expanded", "overlapping", "negated")
# Kinds of values. "rows" have norms of very different size; "nan" and "inf" are set in a few entries.
VALUES = ("zeros", "ones", "huge", "tiny", "rows", "nan", "inf")
WRONG_DTYPES = ("float32", "float64", "float16", "int32", "int64", "uint8", "int16", "bool", "complex64")
# float64 has no wider type to sum in, so its extremes are chosen such that their squares do not overflow.
_HUGE = {torch.float16: 200.0, torch.bfloat16: 1e17, torch.float32: 1e17, torch.float64: 1e150}
_TINY = {torch.float16: 1e-6, torch.bfloat16: 1e-39, torch.float32: 1e-39, torch.float64: 1e-140}


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def draw(shape: tuple[int, ...], dtype: torch.dtype, values: str, generator: torch.Generator) -> Tensor:
    """Return a contiguous tensor of one of the kinds in ``VALUES``, or of ``normal`` values."""
    if values in ("zeros", "ones"):
        return torch.full(shape, float(values == "ones"), dtype=dtype)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values == "huge":
        tensor *= _HUGE[dtype]
    elif values == "tiny":
        tensor *= _TINY[dtype]
    elif values == "rows":
        limit = 2 if dtype == torch.float16 else 15
        tensor *= 10.0 ** torch.randint(-limit, limit, (*shape[:-1], 1), generator=generator)
    elif values in ("nan", "inf") and tensor.numel():
        places = torch.randint(tensor.numel(), (1 + tensor.numel() // 50,), generator=generator)
        tensor.view(-1)[places] = float(values)
    return tensor.to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a tensor of the same shape and dtype; only expanded and overlapping change the values."""
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.dim() and len(tensor) else tensor
    if layout == "overlapping":
        if tensor.dim() != 2 or 0 in tensor.shape:
            return tensor
        return tensor.new_empty(0).set_(_window(tensor)).as_strided(tensor.shape, (1, 1), 1)
    if layout == "negated":
        # torch sets the negative bit only on parts of complex numbers; integer tensors never have it.
        return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor
    if tensor.dim() == 0:
        return tensor
    if layout == "narrowed":
        wide = tensor.new_zeros(tensor.shape[0] + 3, *tensor.shape[1:])
        wide[2:-1] = tensor
        return wide[2:-1]
    if layout == "stepped":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "padded":  # rows with a gap between them
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        wide[..., :-3] = tensor
        return wide[..., :-3]
    return tensor


def _window(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[: tensor.shape[0] + tensor.shape[1]].repeat(2)[
        : tensor.shape[0] + tensor.shape[1] + 1
    ]


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    values: str = "normal",
    layout: str = "plain",
) -> Tensor:
    return laid_out(draw(shape, dtype, values, generator), layout)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that NaNs compare equal."""
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return torch.cat([bits_of(tensor.indices()), bits_of(tensor.values())])
    flat = tensor.detach().resolve_neg().reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    if left is None or right is None:
        return left is right
    return (
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits_of(left), bits_of(right))
    )


class Unchanged:
    """Raise unless the given tensors keep their bits during the block."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [each for each in tensors if each is not None and not each.is_meta]

    def __enter__(self) -> None:
        self.before = [bits_of(each).clone() for each in self.tensors]

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            for tensor, before in zip(self.tensors, self.before, strict=True):
                assert torch.equal(bits_of(tensor), before), "an argument was modified"


class Refused(NamedTuple):
    """A documented error that a call raised."""

    kind: type
    message: str


# The errors that the ops document; torch's dispatcher and allocator raise the last two.
DOCUMENTED = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)


def outcome(call: Callable[[], Any], names: Iterable[str] = ()) -> Any:
    """Return the result of a call, or its error, which must be documented and mention one of ``names``."""
    try:
        return call()
    except Exception as raised:
        error = raised
    kind = type(error)
    # torch raises its own subclasses of RuntimeError; RecursionError, Python's subclass, is not documented.
    assert kind in DOCUMENTED or kind.__module__.startswith("torch"), f"{kind.__name__}: {error}"
    names = list(names)
    words = set(re.findall(r"\w+", str(error)))
    assert not names or words & set(names), f"{kind.__name__} names no argument: {error}"
    return Refused(kind, str(error))


def spoiled(tensor: Tensor | None, how: dict[str, Any]) -> Tensor | None:
    """Return an argument made invalid, or only unusual, in the way that ``spoiling`` drew."""
    if how["kind"] == "none":
        return None
    if tensor is None:
        tensor = torch.zeros(3)
    kind, at = how["kind"], how["at"]
    if kind == "dtype":
        return tensor.to(dtype_of(how["dtype"]))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "layout":
        return laid_out(tensor, how["layout"])
    if kind == "dim":
        return tensor.unsqueeze(at % (tensor.dim() + 1))
    if kind == "flat":
        return tensor.reshape(-1)
    if tensor.dim() == 0:
        return tensor.repeat(at % 3)
    dim = at % tensor.dim()
    if kind == "longer":
        return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
    if kind == "shorter":
        return tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1))
    if kind == "empty":
        return tensor.narrow(dim, 0, 0)
    if kind == "selected":
        return tensor.select(dim, 0) if tensor.shape[dim] else tensor
    if kind == "swapped":
        return tensor.transpose(0, -1)
    if kind == "value":
        changed = tensor.clone(memory_format=torch.contiguous_format).resolve_neg()
        if changed.numel():
            flat = changed.view(-1)
            if changed.dtype == torch.bool:
                extremes: list[Any] = [True]
            elif changed.is_floating_point() or changed.is_complex():
                most = torch.finfo(changed.dtype).max
                extremes = [-most, most, float("nan"), float("inf")]
            else:
                limits = torch.iinfo(changed.dtype)
                extremes = [limits.min, limits.max, max(limits.min, -1), limits.max // 2]
            flat[at % len(flat)] = extremes[at // 64 % len(extremes)]
        return changed
    raise AssertionError(kind)


_KINDS = (
    "none", "dtype", "meta", "layout", "dim", "flat", "longer", "shorter", "empty", "selected", "swapped",
    "value",
)  # fmt: skip


def spoiling(random: Random, names: Iterable[str]) -> dict[str, Any]:
    """Draw an argument to spoil and the way to do it."""
    return dict(
        name=random.choice(list(names)),
        kind=random.choice(_KINDS),
        at=random.randrange(1 << 16),
        dtype=random.choice(WRONG_DTYPES),
        layout=random.choice(LAYOUTS),
    )


def assert_within(
    got: Tensor, exact: Tensor, bound: Tensor, sizes: Tensor, what: str, undefined: Tensor | bool = True
) -> None:
    """Raise unless ``|got - exact| <= bound``.

    Where ``sizes``, the sum of the absolute values of the terms, nears the largest number of the dtype, a
    sum may overflow and the result is not checked. Where the exact value is NaN and ``undefined`` holds, the
    result must be NaN, too.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    largest = torch.finfo(got.dtype).max / 8
    checked = (sizes < largest) & exact.isfinite()
    error = (got.double() - exact).abs()
    wrong = checked & ~(error <= bound)  # an unexpected NaN fails the comparison
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: got {got[at].item()!r} at {at}, expected {exact[at].item()!r} "
            f"within {bound[at].item():.3g}"
        )
    lost = exact.isnan() & got.isfinite() & undefined
    assert not bool(lost.any()), f"{what}: a NaN was lost at {tuple(lost.nonzero()[0].tolist())}"


def rounding(dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the unit roundoff of a dtype and of its sums, and the value below which they may flush to 0."""
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    smallest = max(torch.finfo(dtype).smallest_normal * (1 if dtype != torch.float16 else 2**-10), 1e-300)
    return (
        torch.finfo(dtype).eps / 2,
        torch.finfo(accumulation).eps / 2,
        max(smallest, torch.finfo(accumulation).smallest_normal),
    )
