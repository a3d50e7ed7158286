"""The providers of ``gather_project``: what users could run instead, and embkern's own backends.

A provider is built once per `Problem` (a table and its factors) and then called with many batches of ids.
`Provider.reason` returns why it cannot run here, and every such reason is reported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import gather_project
from embkern.ops.backends import Backend, unavailable

from .shapes import Model

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
MODES = (FORWARD, BACKWARD, BOTH)


@dataclass
class Problem:
    """A random table in factors: codes (V, r), basis (r, H), offset (H,); and a dense one (V, H) for peers.

    The dense table is not the product of the factors, which takes longer to compute than a measurement.
    """

    model: Model
    rank: int
    dtype: torch.dtype
    device: str
    seed: int = 0
    codes: Tensor = field(init=False)
    basis: Tensor = field(init=False)
    offset: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        V, H, r = self.model.V, self.model.H, self.rank

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=self.device)
            return values.to(self.dtype)

        self.codes = draw(V, r).requires_grad_()
        self.basis = (draw(r, H) / r**0.5).requires_grad_()
        self.offset = draw(H).requires_grad_()

    @functools.cached_property
    def table(self) -> Tensor:
        """A dense table in the problem's dtype: 4093 random rows, repeated, as drawing all takes long."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        rows = torch.randn(4093, self.model.H, generator=generator, device=self.device).to(self.dtype)
        return rows.repeat(-(-self.model.V // 4093), 1)[: self.model.V].contiguous()

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of ``gather_project`` after ids."""
        return self.codes, self.basis, self.offset


@dataclass
class Lookup:
    """A provider that is ready to run.

    Attributes:
        call: ids (N,) -> rows (N, H).
        nbytes: size of the stored table.
        leaves: the tensors that receive gradients; empty if it cannot be trained.
        own_rows: returns a dense peer's rows in float64, for its check; None for factorised tables.
        tolerance: relative error allowed against ``own_rows``.
    """

    call: Callable[[Tensor], Tensor]
    nbytes: int
    leaves: tuple[Tensor, ...] = ()
    own_rows: Callable[[Tensor], Tensor] | None = None
    tolerance: float = 0.0


def _always(device: str, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """How to build one competitor, when it can run, its baselines, and the memory traffic it needs.

    ``dense``: it stores rows of width H, quantised or not. ``sparse``: its gradient of the codes holds rows
    of the given ids only. ``allowed_factor``: its largest error, relative to two steps in plain torch.
    """

    build: Callable[[Problem], Lookup]
    reason: Callable[[str, torch.dtype], str | None] = _always
    modes: tuple[str, ...] = MODES
    baselines: tuple[str, ...] = ("two-step", "two-step-compiled")
    dense: bool = False
    sparse: bool = False
    allowed_factor: float = 2.0


def two_step(ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
    """Return ``gather_project`` in plain torch, without a kernel."""
    return F.embedding(ids, codes) @ basis + offset


def _of_factors(problem: Problem, function: Callable[..., Tensor]) -> Lookup:
    nbytes = sum(factor.nbytes for factor in problem.factors)
    return Lookup(lambda ids: function(ids, *problem.factors), nbytes, leaves=problem.factors)


def _dense(problem: Problem, function: Callable[[Tensor, Tensor], Tensor] = F.embedding) -> Lookup:
    table = problem.table.detach().requires_grad_()
    return Lookup(
        lambda ids: function(ids, table),
        table.nbytes,
        leaves=(table,),
        own_rows=lambda ids: table.detach()[ids].double(),
    )


@functools.cache
def _compiled() -> Any:
    # One graph per N, as in a server with fixed shapes: as fast as the symbolic graph (within 3 % for N = 1
    # to 4096) and no slower to call. Beyond the limit dynamo runs eager code without a message.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(two_step, dynamic=False, fullgraph=True)


def no_compiler(device: str, dtype: torch.dtype) -> str | None:
    """Return why torch.compile cannot be used, or None if it can."""
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        found, what = bool(shutil.which(compiler)), f"a C++ compiler, and there is no {compiler}"
    else:
        found, what = bool(importlib.util.find_spec("triton")), "triton, which is not installed"
    return None if found else f"torch.compile needs {what}"


def _two_step_sparse(problem: Problem) -> Lookup:
    return _of_factors(
        problem, lambda ids, codes, basis, offset: F.embedding(ids, codes, sparse=True) @ basis + offset
    )


def _buffers(problem: Problem, width: int) -> Callable[[int], Tensor]:
    """Return a function from N to a buffer (N, width), allocated at first use and kept, as in a server."""
    return functools.cache(
        lambda count: torch.empty(count, width, dtype=problem.dtype, device=problem.device)
    )


def _two_step_out(problem: Problem) -> Lookup:
    codes, basis, offset = (factor.detach() for factor in problem.factors)
    gathered, rows = _buffers(problem, problem.rank), _buffers(problem, problem.model.H)

    def call(ids: Tensor) -> Tensor:
        picked = torch.index_select(codes, 0, ids, out=gathered(len(ids)))
        return torch.addmm(offset, picked, basis, out=rows(len(ids)))

    return Lookup(call, sum(factor.nbytes for factor in problem.factors))


def _embkern(problem: Problem, backend: Backend | None = None) -> Lookup:
    return _of_factors(problem, functools.partial(gather_project, backend=backend))


def _embkern_sparse(problem: Problem) -> Lookup:
    return _of_factors(problem, functools.partial(gather_project, sparse=True))


def _embkern_out(problem: Problem) -> Lookup:
    factors = tuple(factor.detach() for factor in problem.factors)
    rows = _buffers(problem, problem.model.H)
    nbytes = sum(factor.nbytes for factor in factors)
    return Lookup(lambda ids: gather_project(ids, *factors, out=rows(len(ids))), nbytes)


def _backend_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    return unavailable(backend, "gather_project", device, dtype)


def _only_cpu_fp32(device: str, dtype: torch.dtype) -> str | None:
    return (
        None if (device, dtype) == ("cpu", torch.float32) else "runs on the CPU only and returns float32 only"
    )


def _quantized(problem: Problem, dtype: torch.dtype) -> Lookup:
    """Quantise every row with its own scale and zero point, by torch's observer."""
    import torch.ao.nn.quantized as nnq
    from torch.ao.quantization import (
        float_qparams_weight_only_qconfig,
        float_qparams_weight_only_qconfig_4bit,
    )

    table = problem.table
    qconfig = {
        torch.quint8: float_qparams_weight_only_qconfig,
        torch.quint4x2: float_qparams_weight_only_qconfig_4bit,
    }[dtype]
    observer = qconfig.weight()
    observer(table)
    scale, zero_point = (each.float() for each in observer.calculate_qparams())
    embedding = nnq.Embedding(problem.model.V, problem.model.H, dtype=dtype)
    embedding.set_weight(torch.quantize_per_channel(table, scale, zero_point, 0, dtype))

    def own_rows(ids: Tensor) -> Tensor:
        rows = torch.quantize_per_channel(table[ids], scale[ids], zero_point[ids], 0, dtype)
        return rows.dequantize().double()

    bits = {torch.quint8: 8, torch.quint4x2: 4}[dtype]
    # The packed 4-bit rows keep their scale and bias in fp16, the 8-bit ones in fp32.
    nbytes = table.numel() * bits // 8 + table.shape[0] * bits
    return Lookup(embedding, nbytes, own_rows=own_rows, tolerance=2e-3)


def _no_fbgemm(device: str, dtype: torch.dtype) -> str | None:
    if reason := _only_cpu_fp32(device, dtype):
        return reason
    try:
        import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401
    except Exception as error:  # an extension built for another torch raises more than ImportError
        return f"fbgemm_gpu does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _fbgemm(problem: Problem, bits: int) -> Lookup:
    """Build the table-batched embedding for inference, without pooling; rows have scale and bias in fp16."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    ops = torch.ops.fbgemm
    table = problem.table
    V, H = table.shape
    embedding = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", V, H, {8: SparseType.INT8, 4: SparseType.INT4}[bits], EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        output_dtype=SparseType.FP32,
        device="cpu",
    )
    embedding.initialize_weights()
    ((values, scale_bias),) = embedding.split_embedding_weights()
    packed = ops.FloatToFusedNBitRowwiseQuantizedSBHalf(table, bits)
    values.copy_(packed[:, :-4])
    scale_bias.copy_(packed[:, -4:])

    @functools.cache
    def bag_offsets(count: int) -> Tensor:
        return torch.tensor([0, count])

    def own_rows(ids: Tensor) -> Tensor:
        packed = ops.FloatToFusedNBitRowwiseQuantizedSBHalf(table[ids], bits)
        return ops.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, bits).double()

    nbytes = values.nbytes + scale_bias.nbytes
    return Lookup(
        lambda ids: embedding(ids, bag_offsets(len(ids))), nbytes, own_rows=own_rows, tolerance=2e-3
    )


def _no_liger(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "a Triton kernel: runs on CUDA only"
    try:
        from liger_kernel.ops import LigerEmbeddingFunction  # noqa: F401
    except ImportError as error:
        return f"liger_kernel does not import: {error}"
    return None


def _liger(problem: Problem) -> Lookup:
    from liger_kernel.ops import LigerEmbeddingFunction

    return _dense(problem, lambda ids, table: LigerEmbeddingFunction.apply(table, ids))


# The dense table in the problem's dtype, its quantised forms, two steps in plain torch, embkern.
PROVIDERS: dict[str, Provider] = {
    "dense": Provider(_dense, dense=True),
    "liger": Provider(_liger, _no_liger, (FORWARD,), dense=True),
    "quint8": Provider(lambda p: _quantized(p, torch.quint8), _only_cpu_fp32, (FORWARD,), dense=True),
    "quint4x2": Provider(lambda p: _quantized(p, torch.quint4x2), _only_cpu_fp32, (FORWARD,), dense=True),
    "fbgemm-int8": Provider(lambda p: _fbgemm(p, 8), _no_fbgemm, (FORWARD,), dense=True),
    "fbgemm-int4": Provider(lambda p: _fbgemm(p, 4), _no_fbgemm, (FORWARD,), dense=True),
    "two-step": Provider(lambda p: _of_factors(p, two_step)),
    # A rival may sum less exactly: the error of inductor's offset gradient is 5 to 9 times eager's.
    "two-step-compiled": Provider(lambda p: _of_factors(p, _compiled()), no_compiler, allowed_factor=20.0),
    "two-step-out": Provider(_two_step_out, modes=(FORWARD,)),
    "two-step-sparse": Provider(_two_step_sparse, modes=(BACKWARD, BOTH), sparse=True),
    "embkern": Provider(_embkern),
    **{
        f"embkern-{backend}": Provider(
            functools.partial(_embkern, backend=backend), functools.partial(_backend_reason, backend)
        )
        for backend in get_args(Backend)
    },
    "embkern-out": Provider(_embkern_out, modes=(FORWARD,), baselines=("two-step-out",)),
    "embkern-sparse": Provider(
        _embkern_sparse, modes=(BACKWARD, BOTH), baselines=("two-step-sparse",), sparse=True
    ),
}
