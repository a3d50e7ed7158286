"""``product_quantization``: its bytes, subspaces, scales and rotations."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from embkern.methods.product import product_quantization
from embkern.methods.storage import direction_error
from tests.methods.row_tables import dense, embeddings, needs_faiss


@needs_faiss
def test_a_table_of_few_codewords_is_nearly_exact():
    words = torch.randn(4, 16, 8).half().float()  # 16 codewords for each of four subspaces
    table = torch.cat([book[torch.randint(16, (900,))] for book in words], dim=1)
    got = product_quantization(table, ratio=8, bits=4, scales=False, rotation="none", iterations=50)
    assert got.facts["subspaces"] >= 4
    assert direction_error(table, dense(got)) < 0.02  # k-means finds most of the codewords
    assert got.nbytes == math.ceil(900 * got.facts["subspaces"] * 4 / 8) + 16 * 32 * 2


@needs_faiss
def test_subspaces_of_uneven_width_cover_every_column():
    table = embeddings(2000, 7)
    got = product_quantization(table, ratio=4.5, bits=8, scales=False)
    assert 1 < got.facts["subspaces"] < 7
    assert torch.isfinite(dense(got)).all()
    assert (dense(got).abs().sum(0) > 0).all()


@needs_faiss
def test_scales_are_chosen_where_rows_differ_in_length():
    table = embeddings(2000, 32)
    assert product_quantization(table * torch.logspace(0, 2, 2000).unsqueeze(1), ratio=8).facts["scales"]
    errors = {
        scales: direction_error(table, dense(product_quantization(table, ratio=8, scales=scales)))
        for scales in (True, False, None)
    }
    assert errors[None] <= 1.01 * min(errors[True], errors[False])


@needs_faiss
def test_a_rotation_lowers_the_error_of_correlated_columns():
    table = torch.randn(4000, 16) * torch.logspace(0, -1.5, 16) @ torch.linalg.qr(torch.randn(16, 16))[0]
    plain, pca, opq = (
        product_quantization(table, ratio=8, bits=6, scales=False, rotation=rotation)
        for rotation in ("none", "pca", "opq")
    )
    assert pca.rotation.nbytes == opq.rotation.nbytes == 16 * 16 * 2
    errors = [direction_error(table, dense(each)) for each in (plain, pca, opq)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_without_faiss_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        product_quantization(embeddings(), ratio=4)
