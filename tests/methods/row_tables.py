"""A table to compress, and all methods that make row tables, with options that make them fast."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from embkern.methods.nonlinear import nonlinear_autoencoder
from embkern.methods.product import product_quantization
from embkern.methods.pruning import prune
from embkern.methods.scalar import lloyd_max, rtn
from embkern.methods.tensor_train import tensor_train

needs_faiss = pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")

FAST = {
    nonlinear_autoencoder: {"epochs": 8, "batch_size": 32, "lr": 3e-3},
    product_quantization: {"iterations": 3},
}

METHODS = [
    pytest.param(method, marks=needs_faiss if method is product_quantization else (), id=method.__name__)
    for method in (
        rtn,
        lloyd_max,
        product_quantization,
        nonlinear_autoencoder,
        tensor_train,
        prune,
    )
]


# The least share of the budget that a method uses, as bits and ranks are integers. Where b bits per value fit
# and b + 1 just do not, b / (b + 1) is used; the tests' largest ratio, 5, leaves 3.2 bits of fp16.
USED = {rtn: 0.7, lloyd_max: 0.7, product_quantization: 0.7, nonlinear_autoencoder: 0.9}


def dense(table):
    """Return the decoded rows (V, H) in fp32, which are not rounded to the dtype of storage."""
    return table.to(torch.float32).to_dense()


def run(method, table, ratio, **options):
    return method(table, ratio=ratio, **{**FAST.get(method, {}), **options})


def embeddings(V=1000, H=33, dtype=torch.float32):
    """Return rows (V, H) in 40 clusters, with a decaying spectrum and different norms."""
    rows = torch.randn(40, H)[torch.arange(V) % 40] + 0.7 * torch.randn(V, H)
    return (rows * torch.logspace(0, -1, H) * (0.5 + torch.rand(V, 1))).to(dtype)
