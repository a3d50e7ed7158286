"""Fixtures of studies: tiny models whose vocabulary holds difficult names, and a finished study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A directory of tiny models and of texts."""
    from tests.study.tiny_models import LINES, MODELS, tokenizer

    root = tmp_path_factory.mktemp("study")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)))
    return root


@pytest.fixture(scope="session", autouse=True)
def _short_lookups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embkern.study.measures.LOOKUP_ROUNDS", 3)
        yield


@pytest.fixture(scope="session")
def done(models, tmp_path_factory):
    """A study of the masked model with every measure."""
    from embkern.study import compare
    from tests.study.tiny_models import FEW, ODD

    text = models / "text.txt"
    return compare(
        models / "masked", output=tmp_path_factory.mktemp("done"), **FEW, text=text, dataset=str(text),
        words=[*ODD[:5], "red"],
    )  # fmt: skip
