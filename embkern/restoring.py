"""Restore the rows that a compressed model does not store."""

from __future__ import annotations

import os

from .models.loading import load_model, load_tokenizer
from .models.saving import check_output, save
from .models.unseen_rows import restore_rows
from .tables.unseen_rows import UnseenRows


def restore(
    directory: str | os.PathLike,
    rows: str | os.PathLike,
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> None:
    """Save a compressed model as a dense one, with the rows that its table does not store.

    Rows that the table keeps are those it decodes to: after ``prune`` the original ones, so that the whole
    table has its original bits. To drop others, or fewer, compress the result again.

    Args:
        directory: a model that ``embkern.compress`` saved with ``keep_unseen``.
        rows: the file that ``keep_unseen`` named.
        output: directory to save to. It is complete or does not exist.
        overwrite: whether to replace ``output`` if all of its files were written by embkern.

    Raises:
        FileNotFoundError: the model or the file does not exist.
        ValueError: the file is damaged or of another model, or the model does not lack rows.
        FileExistsError: ``output`` exists and may not be replaced.
        OSError: ``output`` cannot be written.
    """
    check_output(output, overwrite, source=directory)
    found, model = UnseenRows.load(rows), load_model(directory)
    save(restore_rows(model, found), output, source=os.fspath(directory), tokenizer=load_tokenizer(directory))
