"""One run of Trainer: what is fixed of the token embeddings, checkpoints to go on from, the final score."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback

from ..layer import CompressedEmbedding
from ..model_table import input_embeddings
from ..transformers import stored_table
from .tasks import Prepared, Training

Freeze = Literal["none", "codes", "table"]

_SHARED_BY_ALL_TOKENS = ("basis", "offset")


def freeze_table(model: PreTrainedModel, rule: Freeze) -> None:
    """Fix a model's token embeddings, dense or compressed: none, what each token has for itself, or all."""
    for name, parameter in input_embeddings(model).named_parameters():
        trained = rule == "none" or (rule == "codes" and name in _SHARED_BY_ALL_TOKENS)
        parameter.requires_grad_(trained)


class Trained(NamedTuple):
    """What came of a run."""

    scores: dict[str, float]
    steps: int
    seconds: float  # since it started, or went on from a checkpoint


def train_and_score(
    model: PreTrainedModel,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    folder: Path,
    *,
    seed: int,
    eval_batch_size: int,
    save_steps: int,
    quiet: bool | None,
) -> Trained:
    """Train a model in place, from the last checkpoint in ``folder`` if there is one, and score it.

    Raises:
        ValueError: the batch cannot be divided as asked, or training diverged.
    """
    parts = training.accumulation * max(1, torch.cuda.device_count())
    if training.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of accumulation x devices = {parts}, got {training.batch_size}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.batch_size // parts,
        gradient_accumulation_steps=training.accumulation,
        per_device_eval_batch_size=eval_batch_size,
        fp16=training.precision == "fp16",
        bf16=training.precision == "bf16",
        seed=seed,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=prepared.train,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_StepBar(quiet)],
    )
    for printing in (PrinterCallback, ProgressCallback):  # they write to stdout, which is for results
        trainer.remove_callback(printing)
    started = time.perf_counter()
    with _whole_checkpoints(model):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    seconds = time.perf_counter() - started
    _round_as_stored(model)
    return Trained(prepared.score(trainer), trainer.state.global_step, round(seconds, 1))


class _StepBar(TrainerCallback):
    """A bar of the steps of one run, on stderr."""

    def __init__(self, quiet: bool | None) -> None:
        self.quiet = quiet

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=self.quiet
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


# ---- checkpoints -----------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> str | None:
    """Return the last whole checkpoint in a folder; Trainer writes the state last."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in a folder, whole or not."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


@contextmanager
def _whole_checkpoints(model: PreTrainedModel) -> Iterator[None]:
    """Save a packed table in the dtype it is trained in: going on from a checkpoint then loses nothing."""
    if not isinstance(input_embeddings(model), CompressedEmbedding):
        yield
        return
    state: Any = model.config.quantization_config.table
    stored, state.dtype = state.dtype, str(model.dtype).removeprefix("torch.")
    try:
        yield
    finally:
        state.dtype = stored


def _round_as_stored(model: PreTrainedModel) -> None:
    """Round what was trained of a packed table to the dtype it has on disk."""
    embedding: Any = input_embeddings(model)
    if isinstance(embedding, CompressedEmbedding):
        with torch.no_grad():
            embedding.replace(stored_table(model).to(dtype=embedding.dtype))
