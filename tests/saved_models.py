"""A recipe of each kind of table, for the tests of whole models."""

from __future__ import annotations

import pytest

SVD = dict(method="svd", rank=5)
PACKED = dict(method="quantize", ratio=2)
both_kinds = pytest.mark.parametrize("recipe", [SVD, PACKED], ids=["factors", "packed"])
