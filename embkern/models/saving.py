"""Save a model with its tokenizer, report and model card, atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.atomic import check_writable_directory, replacing_directory
from ..io.checked_json import to_checked_json
from ..io.errors import disk_error
from .report import REPORT_NAME, Report, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST_NAME = "embkern_files.json"  # list of the files that --overwrite may replace

# Files that sentence-transformers keeps beside a model, for pooling and normalisation.
_SENTENCE_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]*_*/*",
)


def check_output(output: str | os.PathLike, overwrite: bool, source: Any = None) -> None:
    """Raise unless a model may be saved at ``output``; for use before the compression.

    Args:
        output: the directory to write.
        overwrite: whether it may replace a directory of files that embkern wrote.
        source: the model to read, whose directory must not be replaced.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is False, or it holds files that embkern did not
            write.
        ValueError: ``output`` is the source, or holds it.
        OSError: ``output`` cannot be written, or is a mount point, which cannot be replaced.
    """
    path = Path(output).resolve()
    if isinstance(source, (str, os.PathLike)) and Path(source).exists():
        dense = Path(source).resolve()
        if path == dense or path in dense.parents:
            raise ValueError(
                f"output: {output} is, or holds, the model to read ({source}); choose another name"
            )
    if os.path.ismount(path):
        raise OSError(
            f"output: {path} is a mount point and cannot be replaced whole; name a directory inside it"
        )
    check_writable_directory(path.parent, "output")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"output: {path} exists; choose another name, or pass overwrite (--overwrite)")
    foreign = _foreign_files(path)
    if foreign:
        raise FileExistsError(
            f"output: {path} holds files that embkern did not write ({', '.join(foreign[:3])}); "
            "it is not replaced"
        )


def save(
    model: PreTrainedModel,
    output: str | os.PathLike,
    *,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Report | None = None,
) -> None:
    """Save a model with what belongs to it; an existing directory is replaced atomically.

    Args:
        model: the model.
        output: the directory.
        source: directory or hub name of the dense model, whose sentence-transformers files are copied.
        tokenizer: the model's tokenizer.
        report: the report, from which the model card is written as well.

    Raises:
        OSError: the directory cannot be written, for example to a full disk.
    """
    with replacing_directory(output) as directory:
        try:
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        except Exception as error:  # safetensors and tokenizers raise no OSError where a disk is full
            if refused := disk_error(error):
                raise refused from error
            raise
        if source is not None:
            _copy_sentence_files(source, directory)
        if report is not None:
            (directory / REPORT_NAME).write_text(to_checked_json(report, indent=2), encoding="utf-8")
            (directory / "README.md").write_text(model_card(report), encoding="utf-8")
        manifest = json.dumps(sorted(_files(directory)), indent=1)
        (directory / MANIFEST_NAME).write_text(manifest + "\n", encoding="utf-8")


def _foreign_files(directory: Path) -> list[str]:
    """Return the files in a directory that are not in the manifest that ``save`` wrote."""
    if not directory.is_dir():
        return [directory.name]
    known: set[str] = set()
    manifest = directory / MANIFEST_NAME
    if manifest.is_file():
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            known = set(json.loads(manifest.read_text(encoding="utf-8")))
    return sorted(_files(directory) - known - {MANIFEST_NAME})


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def _copy_sentence_files(source: str, directory: Path) -> None:
    """Copy the files of sentence-transformers, without which a sentence encoder loses its pooling."""
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=list(_SENTENCE_FILES))
    for pattern in _SENTENCE_FILES:
        for path in sorted(Path(source).glob(pattern)):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, copy)
