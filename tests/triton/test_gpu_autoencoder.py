"""autoencoder_loss in Triton on a device: products of cuBLAS, bf16, CUDA graphs, peak memory, no TF32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from embkern.ops import reference
from embkern.triton import autoencoder as ae
from embkern.triton.autoencoder.gram_form import ALIGNMENT, gram_pays
from embkern.triton.autoencoder.row_form import Y_BYTES
from tests.conftest import assert_no_worse_than, relative_error
from tests.triton.gram_bounds import assert_gradients_within_bounds

pytestmark = pytest.mark.gpu
COSINE_AND_SQUARES, EVERY_TERM = (1.0, 1.0, 0.0, 0.0), (0.2, 0.5, 0.3, 0.4)
# (N, r, H): table and batch of the paper; odd rows in several programs; a rank near H, for the form by rows.
SHAPES = [(30522, 75, 768), (32, 75, 768), (2049, 13, 77), (4099, 400, 768)]


def problem(shape, dtype=torch.float32, encoder=True):
    """A random model of random rows, with every optional tensor."""
    N, r, H = shape
    target, codes = torch.randn(N, H, device="cuda"), torch.randn(N, r, device="cuda")
    weight, basis = torch.randn(r, H, device="cuda") / H**0.5, torch.randn(r, H, device="cuda") / r**0.5
    bias, offset = 0.1 * torch.randn(r, device="cuda"), 0.3 * torch.randn(H, device="cuda")
    model = (None, weight, bias) if encoder else (codes, None, None)
    tensors = [None if each is None else each.to(dtype) for each in (target, *model, basis, offset)]
    accumulation = reference.accumulation_dtype(dtype)
    row_weight = torch.rand(N, device="cuda", dtype=accumulation) + 0.1
    return [*tensors, row_weight, tensors[0].to(accumulation).norm(dim=1)]


def options(weights=COSINE_AND_SQUARES, reduction=reference.MEAN):
    return reduction, *weights, 0.7, 1e-8, True


def double(arguments):
    return [each if each is None else each.double() for each in arguments]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [COSINE_AND_SQUARES, EVERY_TERM], ids=["two terms", "all terms"])
@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "codes"])
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(shape, dtype, weights, encoder):
    arguments = problem(shape, dtype, encoder)
    ours = ae.autoencoder_forward(*arguments, *options(weights))
    native = reference.autoencoder_forward(*arguments, *options(weights))
    exact = reference.autoencoder_forward(*double(arguments), *options(weights))
    for got, theirs, true in zip(ours, native, exact, strict=True):
        assert got.dtype == theirs.dtype
        if true.numel():
            assert_no_worse_than(got, theirs, true, tiny=1e-6)


@pytest.mark.parametrize("fit", [0.5, 1e-2, 1e-4])
def test_a_good_fit_does_not_cancel(fit):
    target, codes, _, _, basis, offset, *_ = problem((4096, 64, 512), encoder=False)
    target = codes @ basis + offset
    target += fit * target.norm(dim=1, keepdim=True) / 512**0.5 * torch.randn_like(target)
    arguments = [target, codes, None, None, basis, offset, None, None]
    assert gram_pays(target, 64)
    squares = options((0.0, float(target.shape[1]), 0.0, 0.0))
    ours = ae.autoencoder_forward(*arguments, *squares)
    native = reference.autoencoder_forward(*arguments, *squares)
    exact = reference.autoencoder_forward(*double(arguments), *squares)
    assert relative_error(ours[0][2], exact[0][2]) <= 2 * relative_error(native[0][2], exact[0][2]) + 1e-6
    assert_gradients_within_bounds(target, codes, basis, ours, exact)


@pytest.mark.parametrize("by_gram", [True, False])
def test_fp32_is_not_cut_to_tf32(by_gram):
    """TF32 keeps 10 bits, which is an error of 1e-4; the setting of the caller has no effect."""
    weights = COSINE_AND_SQUARES if by_gram else EVERY_TERM
    arguments = problem((4096, 64, 512))
    exact = reference.autoencoder_forward(*double(arguments), *options(weights))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ours = ae.autoencoder_forward(*arguments, *options(weights))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    for got, true in zip(ours, exact, strict=True):
        if true.numel():
            assert relative_error(got, true) < 2e-5


@pytest.mark.parametrize("weights", [COSINE_AND_SQUARES, EVERY_TERM], ids=["two terms", "all terms"])
@pytest.mark.parametrize("N", [32, 4096])
def test_replays_in_a_cuda_graph(N, weights):
    """There is no host synchronisation, because capture would refuse it."""
    arguments = problem((N, 64, 512))
    ae.autoencoder_forward(*arguments, *options(weights))  # This call compiles.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ae.autoencoder_forward(*arguments, *options(weights))
    arguments[0].copy_(torch.randn_like(arguments[0]))
    arguments[-1].copy_(arguments[0].norm(dim=1))
    graph.replay()
    exact = reference.autoencoder_forward(*double(arguments), *options(weights))
    for got, true in zip(captured, exact, strict=True):
        if true.numel():
            assert relative_error(got, true) < 2e-5


@pytest.mark.parametrize("weights", [COSINE_AND_SQUARES, EVERY_TERM], ids=["two terms", "all terms"])
def test_the_same_bits_in_every_run(weights):
    arguments = problem((5000, 75, 768), torch.bfloat16)
    first = ae.autoencoder_forward(*arguments, *options(weights))
    for _ in range(5):
        again = ae.autoencoder_forward(*arguments, *options(weights))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def peak(arguments, weights):
    """Peak of the bytes allocated in addition to the arguments."""
    ae.autoencoder_forward(
        *arguments, *options(weights)
    )  # This call compiles, and cuBLAS allocates its workspace.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ae.autoencoder_forward(*arguments, *options(weights))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("weights", [COSINE_AND_SQUARES, EVERY_TERM], ids=["two terms", "all terms"])
def test_neither_the_reconstruction_nor_its_gradient_exists(weights):
    N, r, H = shape = (65536, 64, 2048)
    width = r + ALIGNMENT  # codes and a one, padded
    of_rows = 8 * N * width * 4 + N * (4 + 2) * 8  # as gram_form.py counts them; sums and slopes
    blocks = 5 * Y_BYTES  # y, its gradients and products
    parameters = 16 * width * H * 4
    bound = of_rows + parameters if weights == COSINE_AND_SQUARES else blocks + parameters
    bound += 16 << 20
    assert bound < N * H * 4
    assert peak(problem(shape), weights) <= bound
