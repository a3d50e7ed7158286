"""One run of transformers' Trainer: frozen token embeddings, checkpoints to resume from, the final score."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
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

from ..io.atomic import file_checksum, replacing
from ..io.checked_json import read_checked_json, to_checked_json
from ..models.checkpoint import stored_table
from ..models.find_table import input_embeddings
from ..models.training import unfreeze_table
from ..nn.base import CompressedEmbedding
from .tasks import Prepared, Training

Freeze = Literal["none", "codes", "table"]

CHECKSUMS_NAME = "embkern_checksums.json"  # in a checkpoint

_log = logging.getLogger(__name__)

_SHARED_BY_ALL_TOKENS = ("basis", "offset")


def freeze_table(model: PreTrainedModel, rule: Freeze) -> None:
    """Freeze parameters of a model's token embeddings, dense or compressed, by a rule of ``fine_tune``."""
    embedding: Any = input_embeddings(model)
    if isinstance(embedding, CompressedEmbedding):
        unfreeze_table(model, "input")
        embedding = embedding.adjustment
    for name, parameter in embedding.named_parameters():
        trained = rule == "none" or (rule == "codes" and name in _SHARED_BY_ALL_TOKENS)
        parameter.requires_grad_(trained)


class Trained(NamedTuple):
    """The result of a run."""

    scores: dict[str, float]
    steps: int
    seconds: float  # since it started, or was resumed from a checkpoint


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
        ValueError: the batch size is not a multiple of the parts, or training diverged.
        OSError: a checkpoint cannot be written.
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
        callbacks=[_StepBar(quiet), _Checksums()],
    )
    for printing in (PrinterCallback, ProgressCallback):  # they write to stdout, which holds the results
        trainer.remove_callback(printing)
    started = time.perf_counter()
    with _whole_checkpoints(model):
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        except (SafetensorError, RuntimeError) as error:  # raised where the disk is full
            if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error):
                raise OSError(f"output: no checkpoint could be written in {folder}: {error}") from error
            raise
    seconds = time.perf_counter() - started
    _round_as_stored(model)
    return Trained(prepared.score(trainer), trainer.state.global_step, round(seconds, 1))


class _StepBar(TrainerCallback):
    """A progress bar of the steps of one run, on stderr."""

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


class _Checksums(TrainerCallback):
    """Writes the checksums of a checkpoint's files once Trainer has written them all."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        with replacing(folder / CHECKSUMS_NAME) as temporary:
            temporary.write_text(to_checked_json(_checksums_in(folder)), encoding="utf-8")


def _checksums_in(folder: Path) -> dict[str, str]:
    """Return the checksums of the files in a checkpoint, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {
        path.relative_to(folder).as_posix(): file_checksum(path)
        for path in paths
        if path.name != CHECKSUMS_NAME
    }


def last_checkpoint(folder: Path) -> str | None:
    """Return the last whole checkpoint in a folder: one whose files all have their recorded checksums.

    Later ones are removed with a warning, because Trainer keeps the highest number and would delete new ones.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            if read_checked_json(path / CHECKSUMS_NAME) == _checksums_in(path):
                return str(path)
            reason = "a file has changed since it was written"
        except (FileNotFoundError, ValueError) as error:
            reason = str(error)
        _log.warning("%s is damaged and is removed: %s", path, reason)
        shutil.rmtree(path)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in a folder, whole or not."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


@contextmanager
def _whole_checkpoints(model: PreTrainedModel) -> Iterator[None]:
    """Save the changes of a compressed table as they are, so that a resumed run loses nothing."""
    if not isinstance(input_embeddings(model), CompressedEmbedding):
        yield
        return
    quantizer: Any = model.hf_quantizer
    quantizer.keeps_adjustment = True
    try:
        yield
    finally:
        quantizer.keeps_adjustment = False


def _round_as_stored(model: PreTrainedModel) -> None:
    """Add what was trained to a compressed table, and round it to the dtype that it has on disk."""
    embedding: Any = input_embeddings(model)
    if isinstance(embedding, CompressedEmbedding):
        with torch.no_grad():
            embedding.fold()
            embedding.replace(stored_table(model).to(dtype=embedding.dtype))
