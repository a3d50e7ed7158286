"""Convert tables and models of the first edition of the packed format to the second one."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from .io.atomic import check_writable, check_writable_directory, new_file, replacing_directory
from .methods.second_edition import second_edition
from .models.conversion import ConvertedTable, convert_folder
from .models.saving import check_output
from .tables.packed import PackedTable


class Converted(BaseModel):
    """What ``convert`` wrote."""

    model_config = ConfigDict(extra="forbid")

    output: str = Field(description="the file or directory that was written")
    tables: list[ConvertedTable] = Field(description="the tables that were of the first edition")


def convert(
    path: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Convert packed tables of the format ``embkern.packed/1``, which torch decodes, to ``embkern.packed/2``.

    Each row keeps its tier, so that the records take the same bytes. What codes of 1 to 4 bits decode to is
    encoded again, and scales are fitted to the new codes; rows of more bits, basis and offset stay as they
    are. The error of the new codes adds to that of the old ones. Where the dense model is at hand, compress
    it again instead.

    Of a model everything else is copied as it is, except the description of the tables in its config and, if
    it has a report, bytes and facts there.

    Args:
        path: a file of ``PackedTable.save``, or the directory of a model in safetensors files.
        output: file or directory to write; it is complete or does not exist.
        in_place: replace ``path`` instead, in one step, once all is written.
        overwrite: whether to replace ``output``, a directory only if all of its files were written by
            embkern.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: neither an output nor ``in_place`` is given, or both; ``output`` is, holds or lies in
            ``path``; there is no packed table, all are of the second edition, or one is damaged.
        FileExistsError: ``output`` exists and may not be replaced.
        OSError: ``output`` cannot be written.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"path: expected the file of a packed table or a model directory, got {path}")
    if (output is None) != in_place:
        given = "both" if in_place else "neither"
        raise ValueError(f"output: expected one, or in_place (--in-place), got {given}")
    target = source if output is None else Path(output)
    if source.is_file():
        tables = [_convert_file(source, target, in_place, overwrite)]
    else:
        _check_directory(source, target, in_place, overwrite)
        with replacing_directory(target) as temporary:
            tables = convert_folder(source.resolve(), temporary)
    return Converted(output=os.fspath(target), tables=tables)


def _convert_file(source: Path, target: Path, in_place: bool, overwrite: bool) -> ConvertedTable:
    if in_place:
        check_writable(source, "path")
    elif target.resolve() == source.resolve():
        raise ValueError(f"output: {target} is the table to read; choose another name, or pass in_place")
    else:
        new_file(target, overwrite)
    table = PackedTable.load(source)
    try:
        found = second_edition(table)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    converted = ConvertedTable.of(source.name, table, found)
    found.save(target)
    return converted


def _check_directory(source: Path, target: Path, in_place: bool, overwrite: bool) -> None:
    if in_place:
        check_writable_directory(source.resolve().parent, "path")
        return
    check_output(target, overwrite, source=source)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"output: {target} lies in the model to read ({source}); choose another name")
