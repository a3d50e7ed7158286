"""Error bounds of the gradients of the Gram form of autoencoder_loss, from rounding in its products."""

from __future__ import annotations

from torch import Tensor

UNIT = 2.0**-24  # unit roundoff of fp32


def gradient_bounds(
    target: Tensor, codes: Tensor, basis: Tensor, exact: dict[str, Tensor]
) -> dict[str, float]:
    """Bounds of the norms of the errors of fp32 gradients, for the squared error alone, where t is -2 / N.

    An fp32 sum of n products has an error within sqrt(n) 2^-24 |a| |b| in any order, in root mean square over
    many sums. Sums one by one reach a third of it where all terms have one sign, less for both signs, and
    sums in blocks reach less. ``P = target @ D^T`` has n = H; ``(t c)^T @ target`` has n = N and the rounding
    of ``t c``. Every gradient is rounded once.

    The error of plain torch is no measure, because it does not have these products. With sums one by one, as
    in AVX-512 kernels, ours is up to 16 times as great as torch's, with sums in blocks 2 to 8 times.
    """
    N, H = target.shape
    target, codes, basis, t = target.double(), codes.double(), basis.double(), 2 / N
    of_products = {
        "codes": H**0.5 * target.norm() * basis.norm(),
        "basis": (N**0.5 + 1) * codes.norm() * target.norm(),
        "offset": (N**0.5 + 1) * N**0.5 * target.norm(),
    }
    return {name: UNIT * float(t * each + exact[name].norm()) for name, each in of_products.items()}


def assert_gradients_within_bounds(
    target: Tensor, codes: Tensor, basis: Tensor, got: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> None:
    """Check the results of autoencoder_forward for codes, basis and offset against those of float64."""
    places = {"codes": 1, "basis": 4, "offset": 5}
    bounds = gradient_bounds(target, codes, basis, {name: exact[i] for name, i in places.items()})
    for name, i in places.items():
        error = float((got[i].double() - exact[i]).norm())
        assert error <= bounds[name], f"{name}: error {error:.2e}, at most {bounds[name]:.2e} is rounding"
