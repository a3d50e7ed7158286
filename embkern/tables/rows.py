"""``RowTable``: a table in any representation of which rows can be decoded on demand, in plain torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..io.tensor_format import TensorFormat
from ..ops.cross_entropy import Reduction, check_arguments, check_options, reduced
from ..ops.library import check_ids
from ..ops.reference.numerics import accumulation_dtype, autocast_off
from .factors import check_floating

# Values of the rows that are decoded at a time; each takes up to 50 bytes for a moment.
PIECE_VALUES = 1 << 18
LARGEST = 2**31 - 1  # number of rows, columns and the like: ids that are stored are int32

AnyRowTable = TypeVar("AnyRowTable", bound="RowTable")


@dataclass(frozen=True, eq=False)
class RowTable:
    """Base of the tables (V, H) that are not ``Factors`` or ``PackedTable``: they decode rows on demand.

    A subclass has its tensors and settings as fields, and decodes rows in ``_decoded``. Lookup, tied head,
    file and model follow from these. All floating-point tensors of a table have the same dtype, and sums over
    them run in fp32 (float64 for float64). No function but ``to_dense`` holds the dense table.

    Class attributes:
        kind: name of the representation in a saved model's config and of its file format.
        required, optional: names of the tensors, of which the first is floating-point.
        setting_names: names of the fields that are integers, lists of integers or names.
        code_dtypes: dtypes of the tensors that are integers.
        per_row: names of the floating-point tensors with one part per row that is stored.

    Attributes:
        num_embeddings: V.
        embedding_dim: H.
        facts: what the method reports about the result (JSON values); not saved.

    Raises:
        ValueError: shapes and settings do not fit each other, or a code is out of range.
        TypeError: a dtype is wrong.
    """

    kind: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    setting_names: ClassVar[tuple[str, ...]] = ()
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {}
    per_row: ClassVar[tuple[str, ...]] = ()

    num_embeddings: int = field(kw_only=True)
    embedding_dim: int = field(kw_only=True)
    facts: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)
    check: InitVar[bool] = field(default=True, kw_only=True)

    def __post_init__(self, check: bool) -> None:
        if check:
            self.validate()

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """Return the names of the tensors that a table has or may have."""
        return cls.required + cls.optional

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the tensors describe a table.

        On the meta device only shapes and dtypes are checked.
        """
        for name in ("num_embeddings", "embedding_dim"):
            expect_integer(name, getattr(self, name), 1, LARGEST)
        for name, tensor in self.tensors().items():
            expected = self.code_dtypes.get(name, self.dtype)
            if tensor.dtype != expected or not (name in self.code_dtypes or expected.is_floating_point):
                kind = expected if name in self.code_dtypes else "a floating-point dtype, that of the others"
                raise TypeError(f"{name}: expected {kind}, got {tensor.dtype}")
        self._check_layout()
        if not any(tensor.is_meta for tensor in self.tensors().values()):
            self._check_values()

    def _check_layout(self) -> None:
        """Raise ValueError unless settings and shapes fit each other."""
        raise NotImplementedError

    def _check_values(self) -> None:
        """Raise ValueError if a code is out of range; tables whose codes cannot be need no check."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point tensors and of the decoded rows."""
        first: Tensor = getattr(self, self.required[0])
        return first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        first: Tensor = getattr(self, self.required[0])
        return first.device

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors (a file adds a header of a few hundred bytes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        named = {name: getattr(self, name) for name in self.tensor_names()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not tensors, as JSON values."""
        names = ("num_embeddings", "embedding_dim", *self.setting_names)
        return {name: getattr(self, name) for name in names}

    def decode(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64): (``*``, H).

        Raises:
            IndexError: an id is negative or not below V (on CPU; on CUDA a device-side assertion).
            TypeError: the ids are not int32 or int64.
        """
        return _decoded_rows(ids, self)

    def check_known(self, ids: Tensor) -> None:
        """Raise IndexError for an id that a layer must not look up, although it is below V."""

    def parts_of(self, ids: Tensor) -> Tensor:
        """Return the numbers of the parts that rows ids (n,) int64 have in the tensors ``per_row``."""
        return ids

    def row_range(self, first: int, last: int) -> Tensor:
        """Return the rows ``first`` to ``last - 1``: (last - first, H)."""
        return self.decode(torch.arange(first, last, device=self.device))

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of ids (n,) int64 that are in range, (n, H) in the dtype of sums."""
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the first row and the one after the last of each piece that is decoded at once."""
        size = max(1, PIECE_VALUES // self.embedding_dim)
        for first in range(0, self.num_embeddings, size):
            yield first, min(self.num_embeddings, first + size)

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H)."""
        return torch.cat([self.row_range(first, last) for first, last in self.pieces()])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``F.linear(hidden, to_dense())``, (``*``, V) for hidden states (``*``, H), piece by piece.

        Gradients flow to hidden and to the floating-point tensors. The backward decodes each piece again, so
        that neither direction holds the dense table.
        """
        return torch.cat([self._checkpointed(self._piece_logits, hidden, *at) for at in self.pieces()], -1)

    def _piece_logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Return the logits (``*``, last - first) of some rows."""
        return F.linear(hidden, self.row_range(first, last).to(hidden.dtype))

    def _checkpointed(self, function: Any, *arguments: Any) -> Any:
        """Call a function whose inner results are computed again in the backward."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    def cross_entropy(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the cross-entropy of a head over the table, whose logits are never held.

        ``F.cross_entropy(capped(logits(hidden) + bias), labels, ...)`` with arguments, result and errors of
        ``packed_cross_entropy``. Logits are computed piece by piece, and again in the backward.
        """
        check_options(label_smoothing, softcap, reduction)
        check_arguments(hidden, labels, bias, self.num_embeddings, ignore_index)
        dtype = torch.promote_types(accumulation_dtype(hidden.dtype), accumulation_dtype(self.dtype))
        flat = labels.reshape(-1)

        def piece(states: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
            logits = self._piece_logits(states, first, last).to(dtype)
            if bias is not None:
                logits = logits + bias[first:last].to(dtype)
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            here = (flat >= first) & (flat < last)
            place = (flat - first).clamp(0, last - first - 1).long().unsqueeze(1)
            of_label = torch.where(here, logits.gather(1, place).squeeze(1), 0)
            return logits.logsumexp(1), of_label, logits.mean(1) * ((last - first) / self.num_embeddings)

        states = hidden.reshape(-1, hidden.shape[-1])
        parts = zip(*(self._checkpointed(piece, states, *at) for at in self.pieces()), strict=True)
        sums, of_label, means = (torch.stack(each) for each in parts)
        losses = sums.logsumexp(0) - (1 - label_smoothing) * of_label.sum(0)
        if label_smoothing:
            losses = losses - label_smoothing * means.sum(0)
        return reduced(losses.masked_fill(flat == ignore_index, 0), labels, ignore_index, reduction)

    def take(self: AnyRowTable, ids: Tensor) -> AnyRowTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat.

        Raises:
            ValueError: the representation cannot order rows anew.
        """
        raise NotImplementedError

    def to(self: AnyRowTable, *args: Any, **kwargs: Any) -> AnyRowTable:
        """Return the table moved, and its floating-point tensors cast, as ``Tensor.to`` does.

        Raises:
            TypeError: the dtype is not floating-point.
        """
        moved: dict[str, Any] = {name: each.to(*args, **kwargs) for name, each in self.tensors().items()}
        check_floating(moved[self.required[0]].dtype)
        for name in moved.keys() & self.code_dtypes.keys():  # codes keep their dtype
            moved[name] = getattr(self, name).to(moved[name].device)
        return dataclasses.replace(self, **moved, check=False)

    @classmethod
    def file_format(cls) -> TensorFormat:
        """Return the format of this table's files."""
        return TensorFormat(
            f"embkern.{cls.kind}/1",
            f"a table of kind {cls.kind}",
            required=cls.required,
            optional=cls.optional,
            settings=("num_embeddings", "embedding_dim", *cls.setting_names),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to one safetensors file; an existing file is replaced atomically."""
        self.file_format().save(path, self.tensors(), **self.settings())

    @classmethod
    def load(cls: type[AnyRowTable], path: str | os.PathLike[str]) -> AnyRowTable:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of such a table.
        """
        return cls.file_format().load(path, lambda tensors, settings: cls(**tensors, **settings))


@autocast_off
def _decoded_rows(ids: Tensor, table: RowTable) -> Tensor:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected dtype torch.int32 or torch.int64, got {ids.dtype}")
    V, flat = table.num_embeddings, ids.reshape(-1).long()
    check_ids(ids, V)
    if flat.is_cuda:
        torch._assert_async(((flat >= 0) & (flat < V)).all())
    rows = table._decoded(flat, accumulation_dtype(table.dtype))
    return rows.to(table.dtype).view(*ids.shape, table.embedding_dim)


def expect_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless a setting is an integer in a range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer, {least} to {most}, got {value!r}")


def expect_shape(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError unless a tensor has a shape; None has any."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
