"""The Triton backend of autoencoder_loss in Triton's interpreter on the CPU: both forms against float64.

The products of torch on CPU replace cuBLAS. The interpreter does not round bf16; the Gram form is tested with
fp16 in its place.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from embkern.ops import autoencoder_loss, reference
from embkern.triton import autoencoder as ae
from embkern.triton.autoencoder import gram_form, row_form
from embkern.triton.launch import Launch
from tests.conftest import assert_no_worse_than, relative_error
from tests.triton.gram_bounds import assert_gradients_within_bounds

EPS = 1e-8
# Cosine and squared error; cosine and root, as in the paper.
WEIGHTS = [(1.0, 1.0, 0.0, 0.0), (0.2, 0.0, 0.7, 0.0)]
POWER = (0.2, 0.5, 0.3, 0.4)
ODD = (35, 13, 45)  # All sizes are odd, and there are several programs.
# (N, r, H): the odd sizes; ranks and columns that need no padding; rank 1.
SHAPES = [ODD, (16, 16, 64), (3, 1, 7)]
CASES = [
    (dict(), WEIGHTS[0], "mean"),
    (dict(encoder=False), WEIGHTS[1], "mean"),
    (dict(bias=False, offset=False, weights=False, norms=False), WEIGHTS[1], "sum"),
    (dict(encoder=False, offset=False, weights=False), WEIGHTS[0], "sum"),
]


@pytest.fixture(params=["gram", "rows"])
def form(request, monkeypatch):
    """Take one form for every shape and dtype, with the rows in several blocks."""
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: request.param == "gram")
    monkeypatch.setattr(row_form, "Y_BYTES", 3000)
    return request.param


def problem(shape, dtype=torch.float32, *, encoder=True, bias=True, offset=True, weights=True, norms=True):
    N, r, H = shape
    accumulation = reference.accumulation_dtype(dtype)
    target = torch.randn(N, H).to(dtype)
    encoder_weight, basis = torch.randn(r, H) / H**0.5, torch.randn(r, H) / r**0.5
    return [
        target,
        None if encoder else torch.randn(N, r).to(dtype),
        encoder_weight.to(dtype) if encoder else None,
        (0.1 * torch.randn(r)).to(dtype) if encoder and bias else None,
        basis.to(dtype),
        (0.3 * torch.randn(H)).to(dtype) if offset else None,
        (torch.rand(N) + 0.1).to(accumulation) if weights else None,
        target.to(accumulation).norm(dim=1) if norms else None,
    ]


def double(arguments):
    return [each if each is None else each.double() for each in arguments]


def options(weights=WEIGHTS[0], reduction="mean", alpha=0.7):
    return reference.REDUCTIONS.index(reduction), *weights, alpha, EPS, True


def check(arguments, options, tiny=3e-7):  # The loss may be exact by chance.
    ours = ae.autoencoder_forward(*arguments, *options)
    native = reference.autoencoder_forward(*arguments, *options)
    exact = reference.autoencoder_forward(*double(arguments), *options)
    for got, theirs, true in zip(ours, native, exact, strict=True):
        assert got.shape == theirs.shape
        assert got.dtype == theirs.dtype
        assert got.is_contiguous()
        if true.numel():
            assert_no_worse_than(got, theirs, true, tiny)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("given", "weights", "reduction"), CASES)
@pytest.mark.usefixtures("poisoned")
def test_no_worse_than_plain_torch(form, shape, given, weights, reduction):
    check(problem(shape, **given), options(weights, reduction))


@pytest.mark.parametrize(("reduction", "alpha"), [("mean", 0.4), ("sum", 1.0)])
@pytest.mark.parametrize("bytes", [2000, 1 << 20], ids=["several blocks", "one"])
@pytest.mark.usefixtures("poisoned")
def test_the_power_term_by_rows(monkeypatch, reduction, alpha, bytes):
    monkeypatch.setattr(row_form, "Y_BYTES", bytes)
    given = dict() if reduction == "sum" else dict(encoder=False, offset=False, weights=False, norms=False)
    check(problem((18, 5, 33), **given), options(POWER, reduction, alpha))


def test_the_gradient_by_rows_is_computed_without_a_loss(monkeypatch):
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: False)
    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launched.append(launch), run(launch)))
    ae.autoencoder_forward(*problem(ODD), *options(POWER))
    losses = [each.arguments["loss_ptr"] for each in launched if "loss_ptr" in each.arguments]
    assert losses
    assert not any(each is not None for each in losses)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_factors_of_16_bits(form, encoder):
    check(problem(ODD, torch.float16, encoder=encoder), options())


@pytest.mark.usefixtures("poisoned")
def test_fp64_is_fp64_throughout(form):
    for weights in WEIGHTS if form == "gram" else [*WEIGHTS, POWER]:
        arguments = problem((21, 5, 9), torch.float64)
        got = ae.autoencoder_forward(*arguments, *options(weights))
        assert_close(
            got, reference.autoencoder_forward(*arguments, *options(weights)), rtol=1e-12, atol=1e-14
        )


def fitted(fit, condition=1.0, shape=(256, 12, 96)):
    """Rows at a relative distance of about ``fit`` from their reconstruction; condition: of the basis."""
    N, r, H = shape
    columns = torch.linalg.qr(torch.randn(H, r, dtype=torch.float64)).Q
    mixed = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    basis = mixed * spectrum @ columns.t()
    rows = torch.randn(N, r, dtype=torch.float64) / r**0.5
    codes, offset = rows / spectrum @ mixed.t(), 0.3 * torch.randn(H, dtype=torch.float64) / H**0.5
    target = rows @ columns.t() + offset + fit * torch.randn(N, H, dtype=torch.float64) / H**0.5
    return [target.float(), codes.float(), None, None, basis.float(), offset.float(), None, None]


@pytest.mark.parametrize("fit", [0.3, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_the_loss_of_a_good_fit_does_not_cancel(monkeypatch, fit, condition):
    """The loss is right at any fit; the gradients have the error of the products over the table."""
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: True)
    arguments = fitted(fit, condition)
    weights = (0.0, float(arguments[0].shape[1]), 0.0, 0.0)
    got = ae.autoencoder_forward(*arguments, *options(weights))
    exact = reference.autoencoder_forward(*double(arguments), *options(weights))
    native = reference.autoencoder_forward(*arguments, *options(weights))
    assert_no_worse_than(got[0], native[0], exact[0], 3e-7)
    target, codes, basis = arguments[0], arguments[1], arguments[4]
    assert_gradients_within_bounds(target, codes, basis, got, exact)


def test_a_known_norm_costs_the_loss_its_rounding(monkeypatch):
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: True)
    arguments = fitted(0.3)
    arguments[7] = arguments[0].norm(dim=1)
    terms = ae.autoencoder_forward(*arguments, *options())[0]
    exact = reference.autoencoder_forward(*double([*arguments[:7], None]), *options())[0]
    assert_close(terms.double(), exact, rtol=1.5e-5, atol=0)


def test_without_the_second_sums_a_good_fit_would_cancel(monkeypatch):
    """Without them, the test above fails."""
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: True)
    monkeypatch.setattr(gram_form, "_SAFE_SHARE", -1.0)
    arguments = fitted(1e-3)
    got = ae.autoencoder_forward(*arguments, *options())
    exact = reference.autoencoder_forward(*double(arguments), *options())
    assert relative_error(got[0][2], exact[0][2]) > 1e-3


def test_zero_equal_and_opposite_rows(form):
    target = torch.randn(6, 9)
    target[1] = 0
    basis = torch.eye(9)
    codes = target.clone()
    codes[2] = 0
    codes[3] *= -1
    codes[1, 0] = 2.0
    arguments = [target, codes, None, None, basis, None, None, None]
    for weights in (*WEIGHTS, (1.0, 1.0, 1.0, 0.0)):
        for reduction in ("mean", "sum"):
            got = ae.autoencoder_forward(*arguments, *options(weights, reduction))
            exact = reference.autoencoder_forward(*double(arguments), *options(weights, reduction))
            assert_close(got, exact, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6, 1e15, 1e20])
def test_huge_and_tiny_rows(form, size):
    arguments = problem((20, 6, 24), encoder=False, norms=False)
    arguments[0] *= size
    arguments[1] *= size
    arguments[5] *= size
    weights = (1.0, 0.0, 0.0, 0.0)  # The squares of 1e20 are beyond fp32 in every formula.
    got = ae.autoencoder_forward(*arguments, *options(weights))
    exact = reference.autoencoder_forward(*double(arguments), *options(weights))
    assert_close(got[0][:2].double(), exact[0][:2], rtol=1e-5, atol=0)
    for index in (1, 4, 5):  # At 1e20, t is subnormal.
        assert relative_error(got[index], exact[index]) < (1e-2 if form == "gram" and size == 1e20 else 1e-5)


def test_a_product_beyond_fp32_does_not_reach_the_loss(monkeypatch):
    """<x, offset> of 1e40 is infinite in fp32, with either sign, although y and its sums are in range."""
    monkeypatch.setattr(gram_form, "gram_pays", lambda *_: True)
    for sign in (1, -1):
        target, offset = torch.rand(20, 24) + 1, sign * (torch.rand(24) + 1)
        codes = 1e20 * torch.randn(20, 6)
        arguments = [1e20 * target, codes, None, None, torch.randn(6, 24), 1e20 * offset]
        weights = (1.0, 0.0, 0.0, 0.0)
        got = ae.autoencoder_forward(*arguments, None, None, *options(weights))
        exact = reference.autoencoder_forward(*double([*arguments, None, None]), *options(weights))
        assert_close(got[0][:2].double(), exact[0][:2], rtol=1e-5, atol=0)


def test_a_nan_row_stays_in_its_row(form):
    arguments = problem((20, 6, 24), encoder=False)
    arguments[0][7, 3] = float("nan")
    terms, grad_codes, *_ = ae.autoencoder_forward(*arguments, *options())
    assert terms[:3].isnan().all()
    assert torch.equal(grad_codes.isnan().any(1).nonzero().flatten(), torch.tensor([7]))


def test_no_rows(form):
    for arguments in (problem((0, 3, 5)), problem((0, 3, 5), encoder=False, weights=False)):
        got = ae.autoencoder_forward(*arguments, *options())
        assert_close(got, reference.autoencoder_forward(*arguments, *options()), equal_nan=True)


class _Largest(TorchDispatchMode):
    """Record the size of the largest tensor that a torch op allocates, views of arguments excepted."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("encoder", [True, False])
def test_the_reconstruction_is_never_written(monkeypatch, encoder):
    N, _, H = shape = (128, 4, 100)
    arguments = problem(shape, encoder=encoder)
    # The bounds: both products, padded; a few rows of y.
    for gram, bytes, bound in ((True, 0, 2 * 8 * N), (False, 16 * H * 4, 16 * H)):
        monkeypatch.setattr(gram_form, "gram_pays", lambda *_, gram=gram: gram)
        monkeypatch.setattr(row_form, "Y_BYTES", bytes)
        with _Largest() as largest:
            ae.autoencoder_forward(*arguments, *options())
        assert largest.elements <= bound < N * H


def test_the_form_follows_the_shape():
    def pays(N, r, H, dtype=torch.float32):
        return gram_form.gram_pays(torch.empty(N, H, dtype=dtype, device="meta"), r)

    assert pays(30522, 299, 768)
    assert not pays(32, 75, 768)
    assert not pays(30522, 512, 768)
    assert not pays(30522, 0, 768)
    assert pays(30522, 128, 768, torch.bfloat16)
    assert not pays(30522, 299, 768, torch.bfloat16)
    assert not pays(30522, 75, 768, torch.float16)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_products_are_not_cut_and_the_setting_is_left_as_it_was(monkeypatch, precision, fails):
    seen = []

    def form(*_):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        if fails:
            raise MemoryError

    monkeypatch.setattr(row_form, "loss_by_rows", form)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        settings = torch.backends.cuda.matmul.fp32_precision, torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(MemoryError) if fails else pytest.MonkeyPatch.context():
            ae.autoencoder_forward(*problem((5, 2, 3)), *options())
        assert seen == ["ieee"]
        assert (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cuda.matmul.allow_tf32,
        ) == settings
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("encoder", [True, False])
def test_through_autograd_and_autocast(form, encoder):
    target, codes, weight, bias, basis, offset, row_weight, norm = problem((20, 3, 10), encoder=encoder)
    leaves = [each.requires_grad_() for each in (codes, weight, bias, basis, offset) if each is not None]
    found = []
    for backend in ("triton", "torch"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backend == "triton"):
            loss = autoencoder_loss(
                target,
                basis,
                offset,
                codes=codes,
                encoder_weight=weight,
                encoder_bias=bias,
                row_weight=row_weight,
                target_norm=norm,
                backend=backend,
            )
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    assert_close(*found)


def test_gradcheck(form):
    arguments = problem((6, 2, 5), torch.float64)
    for each in arguments[2:6]:
        each.requires_grad_()

    def loss(weight, bias, basis, offset):
        terms = dict(cosine_weight=0.7, mse_weight=0.4, rmse_weight=0.3, row_weight=arguments[6])
        encoder = dict(encoder_weight=weight, encoder_bias=bias)
        return autoencoder_loss(arguments[0], basis, offset, **encoder, **terms, backend="triton")

    assert torch.autograd.gradcheck(loss, arguments[2:6])


def test_the_op_has_the_schema_it_declares(form):
    """No output is an input, or a part of another output."""
    for encoder in (True, False):
        torch.library.opcheck(
            torch.ops.embkern.autoencoder_forward.triton,
            (*problem((20, 3, 10), encoder=encoder), *options()),
            test_utils=("test_schema", "test_faketensor"),
        )
        outputs = ae.autoencoder_forward(*problem((20, 3, 10), encoder=encoder), *options())
        storages = [each.untyped_storage().data_ptr() for each in outputs if each.numel()]
        assert len(set(storages)) == len(storages)
