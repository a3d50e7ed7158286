"""What tests of evaluation share: tiny models with their data, and the command line."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def run_command(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """Run ``embkern evaluate`` with arguments; returns its exit code and what it printed."""

    def run(*arguments: object) -> SimpleNamespace:
        from embkern.cli import main as cli

        monkeypatch.setattr(sys, "argv", ["embkern", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed, error = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=printed, err=error)

    return run


# ---- language models -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tests.evaluate.language_models import subwords

    return subwords()


# ---- fine-tuning -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuning(tmp_path_factory) -> Iterator[None]:
    """Make fine-tuning quick and independent of the user's cache of data sets.

    Trainer collects garbage after every run, which takes 0.4 s for the million objects of the imports.
    """
    import datasets

    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A directory with a tiny random model, whose table has rank 6 so that compression loses little."""
    import transformers as T

    from tests.evaluate.tiny_tasks import SPECIAL, WORDS

    path = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = T.BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    torch.manual_seed(0)
    model = T.BertModel(
        T.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            torch.randn(len(tokenizer), 6) @ torch.randn(6, 32) / 6**0.5
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A directory of local data for sst2 and SQuAD."""
    from tests.evaluate.tiny_tasks import questions, sentences, write

    path = tmp_path_factory.mktemp("data")
    for split, count in (("train", 96), ("validation", 16)):
        write(path / "sst2" / f"{split}.jsonl", sentences(count, seed=count))
        write(path / "squad" / f"{split}.jsonl", questions(count // 8, seed=count))
    return path


@pytest.fixture(scope="module")
def learned(fine_tuning, bert, data, tmp_path_factory) -> SimpleNamespace:
    """A study of the dense model and of a packed one, with its directory and its options."""
    from tests.evaluate.tiny_tasks import study

    output = tmp_path_factory.mktemp("learned")
    options: dict[str, Any] = dict(methods=("dense", "allocate"), epochs=8, freeze="none")
    options |= dict(save_steps=20, keep_models=True)
    return SimpleNamespace(result=study(bert, data, output, **options), output=output, options=options)
