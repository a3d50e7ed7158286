"""autoencoder_loss: numbers against float64, gradients, both forms, edge rows, bad input, determinism."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from embkern.ops import autoencoder_loss
from embkern.ops.reference import MEAN
from tests.conftest import assert_no_worse_than, compile_counting, relative_error
from tests.ops.autoencoder_problems import composed

OP = "autoencoder"
# A batch of one block and one of several chunks of blocks; neither is a multiple of a tile.
SHAPES = [(45, 33, 7), (1031, 80, 19)]
NAMES = ("encoder_weight", "encoder_bias", "codes", "basis", "offset")


def problem(N, H, r, dtype=torch.float32, device="cpu", fit=None):
    """Rows and parameters whose loss and gradients are of order 1; ``fit``: |x - y| / |x| of every row."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    basis, offset, codes = draw(r, H) / r**0.5, 0.1 * draw(H), draw(N, r)
    target = draw(N, H)
    if fit is not None:
        target = codes @ basis + offset + fit * draw(N, H)
    parameters = dict(
        encoder_weight=draw(r, H) / H**0.5,
        encoder_bias=0.1 * draw(r),
        codes=codes,
        basis=basis,
        offset=offset,
    )
    return target.to(device, dtype), {k: v.to(device, dtype) for k, v in parameters.items()}


def loss_and_gradients(loss_of, target, parameters, names, dtype):
    leaves = {name: parameters[name].to(dtype).clone().requires_grad_() for name in names}
    loss = loss_of(target.to(dtype), **leaves)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


FORMS = {
    "encoder": ("encoder_weight", "encoder_bias", "basis", "offset"),
    "encoder without biases": ("encoder_weight", "basis"),
    "codes": ("codes", "basis", "offset"),
    "codes without offset": ("codes", "basis"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", ["", "weights", "known norms", "sum", "rmse", "power"])
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(backend, device, shape, form, options):
    target, parameters = problem(*shape, device=device)
    chosen = {
        "": dict(),
        "weights": dict(row_weight=torch.rand(shape[0], device=device)),
        "known norms": dict(target_norm=target.norm(dim=1)),
        "sum": dict(reduction="sum", rmse_weight=0.2),
        "rmse": dict(rmse_weight=0.7, mse_weight=0.0),
        "power": dict(power_weight=0.5, alpha=1.0),  # A smaller alpha amplifies the rounding of y near x.
    }[options]

    def cast(dtype):
        return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in chosen.items()}

    names = FORMS[form]
    ours = loss_and_gradients(
        lambda x, **p: autoencoder_loss(x, **p, **cast(torch.float32), backend=backend),
        target, parameters, names, torch.float32,
    )  # fmt: skip
    plain, exact = (
        loss_and_gradients(
            lambda x, dtype=dtype, **p: composed(x, **p, **cast(dtype)), target, parameters, names, dtype
        )
        for dtype in (torch.float32, torch.float64)
    )
    for got, native, expected in zip(ours, plain, exact, strict=True):
        assert_no_worse_than(got, native, expected, tiny=2**-21)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terms", ["all", "cosine and mse"])
def test_gradcheck(backend, device, form, terms):
    target, parameters = problem(6, 5, 3, torch.float64, device)
    options = dict(rmse_weight=0.3, power_weight=0.4, alpha=0.7) if terms == "all" else {}
    names = FORMS[form]
    leaves = [parameters[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *p: autoencoder_loss(target, **dict(zip(names, p, strict=True)), **options, backend=backend),
        leaves,
    )


@pytest.mark.parametrize("form", ["encoder", "codes"])
def test_the_gram_form_is_the_direct_form_in_float64(native, form):
    # Large batches of cosine and squared error alone take the Gram form; a negligible power term prevents it.
    target, parameters = problem(1031, 80, 19, torch.float64)
    results = [
        loss_and_gradients(
            lambda x, power=power, **p: autoencoder_loss(x, **p, power_weight=power, backend=native),
            target, parameters, FORMS[form], torch.float64,
        )
        for power in (0.0, 1e-30)
    ]  # fmt: skip
    for gram, direct in zip(*results, strict=True):
        assert_close(gram, direct, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fit", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("N", [45, 1031])
def test_a_good_fit_does_not_cancel(backend, device, fit, N):
    target, parameters = problem(N, 80, 19, device=device, fit=fit)
    names = FORMS["codes"]
    got, exact = (
        loss_and_gradients(
            lambda x, **p: autoencoder_loss(x, **p, cosine_weight=0.0, backend=chosen),  # noqa: B023
            target, parameters, names, dtype,
        )
        for dtype, chosen in ((torch.float32, backend), (torch.float64, "torch"))
    )  # fmt: skip
    # The rounding of y relative to the error x - y. It enters the squared error by a product of random sign,
    # of which this allows four standard deviations, and by its square.
    rounding = 19**0.5 * 2**-24 / fit
    bound = 1e-6 + 4 * 2 * rounding / target.numel() ** 0.5 + rounding**2
    assert relative_error(got[0], exact[0]) <= bound


def test_zero_and_extreme_rows_fall_back(backend, device):
    target, parameters = problem(1031, 80, 19, device=device)
    target[3] = 0
    target[700] *= 1e18
    target[701] *= 1e-18
    names, options = FORMS["codes"], dict(mse_weight=0.0)
    if backend == "triton":
        pytest.skip("documented: the Gram form of the Triton backend is for norms whose squares fp32 holds")
    ours = loss_and_gradients(
        lambda x, **p: autoencoder_loss(x, **p, **options, backend=backend),
        target, parameters, names, torch.float32,
    )  # fmt: skip
    plain, exact = (
        loss_and_gradients(lambda x, **p: composed(x, **p, **options), target, parameters, names, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for got, native, expected in zip(ours, plain, exact, strict=True):
        assert_no_worse_than(got, native, expected, tiny=2**-21)


@pytest.mark.parametrize("size", [10.0, 1e3])
@pytest.mark.parametrize("cancels", ["codes", "offset"])
def test_codes_that_undo_each_other_or_the_offset_fall_back(backend, device, cancels, size):
    """|y|^2 is small against the squares that it sums, whose rounding would remain in r dimensions."""
    target, parameters = problem(1031, 80, 19, torch.float64)
    codes, basis = parameters["codes"], parameters["basis"]
    if cancels == "codes":
        basis[1] = basis[0] + basis[1] / size
        codes[:, 0] = size * codes[:, 1]
        codes[:, 1] = torch.randn(1031) - codes[:, 0]
    else:
        parameters["offset"] = size * basis[0]
        codes[:, 0] -= size
    target, parameters = target.to(device).float(), {k: v.to(device).float() for k, v in parameters.items()}
    ours, plain, exact = (
        loss_and_gradients(loss_of, target, parameters, FORMS["codes"], dtype)
        for loss_of, dtype in (
            (lambda x, **p: autoencoder_loss(x, **p, backend=backend), torch.float32),
            (composed, torch.float32),
            (composed, torch.float64),
        )
    )
    for got, native, expected in zip(ours, plain, exact, strict=True):
        assert_no_worse_than(got, native, expected, tiny=2**-21)


def test_products_beyond_fp32_fall_back(backend, device):
    """<x, d> and <d, d> are infinite for a row d of the basis of 1e30, although y is an ordinary row."""
    target, parameters = problem(1031, 80, 19, device=device)
    target *= 1e9
    parameters["basis"] *= 1e30
    parameters["codes"] *= 1e-21
    for sign in (1, -1):
        parameters["offset"] = sign * 1e9 * parameters["offset"].sign()
        results = [
            loss_and_gradients(
                lambda x, chosen=chosen, **p: autoencoder_loss(x, **p, mse_weight=0.0, backend=chosen),
                target, parameters, ("codes", "basis", "offset"), dtype,
            )
            for chosen, dtype in ((backend, torch.float32), ("torch", torch.float64))
        ]  # fmt: skip
        assert relative_error(results[0][0], results[1][0]) < 1e-5


@pytest.mark.parametrize("N", [45, 1031])
def test_the_same_bits_for_any_number_of_threads(native, N):
    target, parameters = problem(N, 80, 37)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            loss_and_gradients(
                lambda x, **p: autoencoder_loss(x, **p, backend=native),
                target, parameters, FORMS["encoder"], torch.float32,
            )
        )  # fmt: skip
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_row_reaches_the_loss(backend, device):
    target, parameters = problem(45, 33, 7, device=device)
    target[5, 5] = float("nan")
    named = {name: parameters[name] for name in FORMS["codes"]}
    codes = named["codes"].requires_grad_()
    loss = autoencoder_loss(target, **named, backend=backend)
    assert loss.isnan()
    loss.backward()
    finite = codes.grad.isfinite().all(1)
    assert not finite[5]
    assert finite[torch.arange(45, device=device) != 5].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_have_a_backend(dtype):
    target, parameters = problem(45, 33, 7, dtype)
    names = FORMS["codes"]
    loss, *grads = loss_and_gradients(autoencoder_loss, target, parameters, names, dtype)
    assert loss.dtype == torch.float32
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)
    with pytest.raises(RuntimeError, match="the native kernel of autoencoder does not take|not built"):
        autoencoder_loss(target, **{name: parameters[name] for name in names}, backend="native")


def test_no_rows(backend, device):
    target, parameters = problem(0, 8, 3, device=device)
    named = {name: parameters[name] for name in FORMS["codes"]}
    assert autoencoder_loss(target, **named, backend=backend).isnan()
    assert autoencoder_loss(target, **named, reduction="sum", backend=backend) == 0


def test_no_reconstruction_is_kept(native):
    target, parameters = problem(20000, 256, 8)
    leaves = {name: parameters[name].requires_grad_() for name in FORMS["encoder"]}
    with torch.profiler.profile(profile_memory=True) as profile:
        autoencoder_loss(target, **leaves, backend=native).backward()
    largest = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
    assert largest < target.nbytes / 10, "torch's allocator saw something of the size of the table"


def test_raw_op_passes_opcheck(native):
    target, p = problem(6, 8, 3)
    op = torch.ops.embkern.autoencoder_forward.native
    options = (MEAN, 1.0, 1.0, 0.0, 0.5, 0.9, 1e-8)
    encoder = (None, p["encoder_weight"], p["encoder_bias"], p["basis"], p["offset"])
    for parameters in (encoder, (p["codes"], None, None, p["basis"], None)):
        for needs_grad in (True, False):
            torch.library.opcheck(op, (target, *parameters, None, None, *options, needs_grad))


def test_compiles_to_one_graph_without_recompiling(backend, device):
    compiled, graphs = compile_counting(lambda x, c, d: autoencoder_loss(x, d, codes=c, backend=backend))
    for count in (5, 9, 33):
        target, parameters = problem(count, 8, 3, device=device)
        pair = [parameters[name].requires_grad_() for name in ("codes", "basis")]
        got = torch.autograd.grad(compiled(target, *pair), pair)
        expected = torch.autograd.grad(
            autoencoder_loss(target, pair[1], codes=pair[0], backend=backend), pair
        )
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs)
    assert len(graphs) == 2


def test_a_second_derivative_is_refused_not_dropped(backend, device):
    target, parameters = problem(5, 8, 3, device=device)
    basis = parameters["basis"].requires_grad_()
    loss = autoencoder_loss(target, basis, codes=parameters["codes"], backend=backend)
    (grad,) = torch.autograd.grad(loss, basis, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(codes=torch.zeros(5, 2)), ValueError, "exactly one of them, got both"),
        (dict(encoder_weight=None, encoder_bias=None), ValueError, "exactly one of them, got none"),
        (dict(encoder_weight=None, codes=torch.zeros(5, 2)), ValueError, "encoder_bias: expected None"),
        (dict(basis=torch.zeros(2, 5)), ValueError, r"basis: expected shape \(r, 4\) as wide as target"),
        (dict(offset=torch.zeros(5)), ValueError, r"offset: expected shape \(4,\), got \(5,\)"),
        (dict(encoder_bias=torch.zeros(3)), ValueError, r"encoder_bias: expected shape \(2,\)"),
        (dict(basis=torch.zeros(2, 4).double()), TypeError, "basis: expected dtype torch.float32"),
        (dict(target=torch.zeros(5, 4, requires_grad=True)), ValueError, "target: .* without gradient"),
        (dict(target=torch.zeros(5, 4, 1)), ValueError, r"target: expected shape \(N, H\)"),
        (dict(reduction="none"), ValueError, "reduction: expected mean or sum, got 'none'"),
        (dict(row_weight=torch.ones(4)), ValueError, r"row_weight: expected shape \(5,\)"),
        (dict(target_norm=torch.ones(5).cfloat()), TypeError, "target_norm: expected a real dtype"),
        (dict(alpha=-1.0), ValueError, "alpha: expected a positive number"),
        (dict(backend="eager"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = dict(
        target=torch.zeros(5, 4),
        basis=torch.zeros(2, 4),
        offset=torch.zeros(4),
        encoder_weight=torch.zeros(2, 4),
        encoder_bias=torch.zeros(2),
    )
    with pytest.raises(error, match=message):
        autoencoder_loss(**arguments | change)
