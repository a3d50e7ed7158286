"""What rounding the products over the table may add to the gradients of the Gram form of autoencoder_loss."""

from __future__ import annotations

from torch import Tensor

UNIT = 2.0**-24  # roundoff of fp32


def gradient_bounds(
    target: Tensor, codes: Tensor, basis: Tensor, exact: dict[str, Tensor]
) -> dict[str, float]:
    """Bounds of the norms of the errors of gradients in fp32, for the squared error alone: t is -2 / N.

    However it is ordered, an fp32 sum of n products has an error within sqrt(n) 2^-24 |a| |b|, in root mean
    square over many: added one by one it makes a third of that where all terms have one sign, less where they
    have not, and less in blocks. ``P = target @ D^T`` has n = H; ``(t c)^T @ target`` has n = N, and the
    rounding of ``t c`` besides. Every gradient is rounded once.

    Plain torch's own error is no measure. It does not have these products, and an order that adds one by one,
    as AVX-512 kernels do, makes ours up to 16 times as great as torch's, blocks 2 to 8 times.
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
