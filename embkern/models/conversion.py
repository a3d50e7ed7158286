"""Saved models with packed tables of the first edition, rewritten with tables of the second one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..io.checked_json import to_checked_json
from ..io.errors import disk_error
from ..io.tensor_format import verify_checksums
from ..methods.second_edition import added_error, second_edition
from ..nn import PackedEmbeddingBag
from ..ops import first_edition
from ..tables.packed import FORMAT, TENSORS, PackedTable
from .body_config import QUANT_METHOD
from .config import EmbkernConfig, TableState
from .report import REPORT_NAME, Report, TableReport, read_report

_REQUIRED = TENSORS[:5]
_CHANGED = ("records", "levels", "scales")
_EXTRA = "_extra_state"  # of static embeddings: the width and the checksums of the table
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


class ConvertedTable(BaseModel):
    """A packed table that was of the first edition of the format, and what its rows lost of their values."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="name of the table's tensors in the checkpoint, or of its file")
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    bytes_before: int = Field(description="bytes of its tensors in the first edition")
    bytes_after: int = Field(description="bytes of its tensors in the second edition")
    direction_error: float = Field(description="mean of 1 - cos between rows of both editions")
    mse: float = Field(description="mean squared error between them")
    squared_error: float = Field(description="their squared error over the squared norms of the first ones")

    @classmethod
    def of(cls, name: str, before: PackedTable, after: PackedTable) -> ConvertedTable:
        """Compare both editions of a table."""
        error = added_error(before, after)
        return cls(
            name=name,
            num_embeddings=before.num_embeddings,
            embedding_dim=before.embedding_dim,
            bytes_before=before.nbytes,
            bytes_after=after.nbytes,
            direction_error=error.direction,
            mse=error.mse,
            squared_error=error.share,
        )


class Checkpoint:
    """The safetensors files of a folder, and the packed tables that they hold.

    Args:
        folder: a folder with the checkpoint of a model, in one file or several.

    Attributes:
        places: the file of every tensor.
        owners: prefixes of the names of the tensors of packed tables.
        first: those whose tables are of the first edition.
        config: content of config.json, if it describes compressed tables.
        named: names of the tables beside that of the input in it.
        states: its descriptions of tables of the first edition, by name.

    Raises:
        ValueError: a file is truncated, or the description of a table is damaged or fits none in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                self.places |= dict.fromkeys(file.keys(), path)
        owners = {key.rpartition(".")[0] for key in self.places if key.endswith(".records")}
        self.owners = sorted(each for each in owners if self._has(each))
        self.first = [each for each in self.owners if self._is_first(each)]
        self.config = _read_config(folder)
        described = {} if self.config is None else self.config["quantization_config"]
        states = EmbkernConfig(**described).states if described else {}
        self.named = set(states) - {""}
        self.states = {name: state for name, state in states.items() if _of_first_edition(state)}

    def _has(self, owner: str) -> bool:
        return all(f"{owner}.{name}" in self.places for name in _REQUIRED)

    def _is_first(self, owner: str) -> bool:
        key = f"{owner}.levels"
        with _opened(self.places[key]) as file:
            return tuple(file.get_slice(key).get_shape()) == first_edition.LEVELS_SHAPE

    def tensor(self, key: str) -> Tensor:
        """Return a tensor of the files."""
        with _opened(self.places[key]) as file:
            found: Tensor = file.get_tensor(key)
            return found

    def table(self, owner: str) -> tuple[PackedTable, str | None]:
        """Return a table of the first edition, and the name of its description in the config.

        Raises:
            ValueError: it is damaged.
        """
        tensors: dict[str, Any] = {
            name: self.tensor(f"{owner}.{name}") for name in TENSORS if f"{owner}.{name}" in self.places
        }
        tensors["levels"] = tensors["levels"].to(first_edition.LEVELS_DTYPES[0])
        shapes = {name: list(each.shape) for name, each in tensors.items()}
        if f"{owner}.{_EXTRA}" in self.places:
            bag = PackedEmbeddingBag.from_state(
                {**tensors, _EXTRA: self.tensor(f"{owner}.{_EXTRA}")}, tensors["scales"].dtype
            )
            return bag.stored_table(), None
        named = {name: state for name, state in self.states.items() if state.shapes == shapes}
        for name, state in named.items():
            try:
                verify_checksums(tensors, state.checksums)
            except ValueError:
                if name == list(named)[-1]:  # none of the others is that of this table
                    raise
                continue
            return PackedTable(**tensors, **state.settings), name
        raise ValueError(f"config.json describes no packed table with the shapes {shapes}")

    def rewritten(self, changed: Collection[str], states: Collection[str]) -> set[Path]:
        """Return the files that ``write`` writes, given the names of what changes."""
        found = {self.places[key] for key in changed}
        if (self.folder / _INDEX).is_file():
            found.add(self.folder / _INDEX)
        return found | ({self.folder / _CONFIG} if states else set())

    def write(self, target: Path, changed: Mapping[str, Tensor], states: Mapping[str, PackedTable]) -> None:
        """Write the folder's files that change to another folder.

        Args:
            target: the folder.
            changed: new tensors, by their names in the files.
            states: the tables of the second edition, by the names of their descriptions in the config.
        """
        for path in sorted({self.places[key] for key in changed}):
            with _opened(path) as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            tensors |= {key: each for key, each in changed.items() if self.places[key] == path}
            try:
                save_file(tensors, target / path.name, metadata)
            except SafetensorError as error:
                if refused := disk_error(error):
                    raise refused from error
                raise
        index = self.folder / _INDEX
        if index.is_file():
            found = json.loads(index.read_text(encoding="utf-8"))
            if "total_size" in (metadata := found.get("metadata") or {}):
                before = sum(self.tensor(key).nbytes for key in changed)
                metadata["total_size"] += sum(each.nbytes for each in changed.values()) - before
            (target / _INDEX).write_text(_as_transformers(found), encoding="utf-8")
        if self.config is not None and states:
            described = EmbkernConfig(**self.config["quantization_config"])
            for name, table in states.items():
                described.states[name].describe(table)
            config = {**self.config, "quantization_config": described.to_dict()}
            (target / _CONFIG).write_text(_as_transformers(config), encoding="utf-8")


class Conversion:
    """The tables of the second edition that take the place of those in a checkpoint, ready to be written.

    Args:
        checkpoint: with a table of the first edition.

    Raises:
        ValueError: a table is damaged, or missing in the files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.changed, self.states = dict[str, Tensor](), dict[str, PackedTable]()
        self.tables: dict[str, ConvertedTable] = {}  # by the name of the description
        for owner in checkpoint.first:
            try:
                table, state = checkpoint.table(owner)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{checkpoint.folder}: {owner} is damaged: {error}") from None
            found = second_edition(table)
            self.changed |= {f"{owner}.{name}": found.tensors()[name] for name in _CHANGED}
            if state is None:
                self.changed[f"{owner}.{_EXTRA}"] = PackedEmbeddingBag(found).get_extra_state()
            else:
                self.states[state] = found
            self.tables[state or ""] = ConvertedTable.of(owner, table, found)
        if missing := set(checkpoint.states) - set(self.states):
            names = ", ".join(name or "the input" for name in sorted(missing))
            raise ValueError(f"{checkpoint.folder}: the files lack the packed table of {names}")

    def rewritten(self) -> set[Path]:
        """Return the files of the checkpoint that ``write`` does not copy."""
        return self.checkpoint.rewritten(self.changed, self.states)

    def write(self, target: Path) -> None:
        """Write what changes to a folder that has a copy of the other files."""
        self.checkpoint.write(target, self.changed, self.states)
        report = read_report(target)
        if report is not None:
            content = to_checked_json(self._noted_in(report), indent=2)
            (target / REPORT_NAME).write_text(content, encoding="utf-8")

    def _noted_in(self, report: Report) -> Report:
        """Return a report with the bytes of the second edition, and what the conversion added as facts."""
        tables = [self._noted(table) for table in report.tables]
        saved = sum(each.bytes_before - each.bytes_after for each in self.tables.values())
        after = report.compressed_bytes - saved
        one = report.facts | (_facts(*self.tables.values()) if len(self.tables) == 1 else {})
        fields = {
            "tables": tables,
            "facts": tables[0].facts if tables else one,
            "compressed_bytes": after,
            "ratio": report.table_bytes / after,
            "model_bytes_after": report.model_bytes_after - saved,
        }
        return report.model_copy(update=fields)

    def _noted(self, table: TableReport) -> TableReport:
        named = table.name in self.checkpoint.named
        found = self.tables.get(table.name if named else "")
        if found is None:
            return table
        after = table.compressed_bytes - found.bytes_before + found.bytes_after
        ratio = table.table_bytes / after
        facts = table.facts | _facts(found)
        return table.model_copy(update={"facts": facts, "compressed_bytes": after, "ratio": ratio})


def convert_folder(folder: Path, target: Path) -> list[ConvertedTable]:
    """Write a model whose packed tables are of the first edition with tables of the second edition.

    All other tensors and files are copied as they are. In the config the description of the tables changes,
    and in a report the bytes; the error that the conversion added is noted there among the facts.

    Args:
        folder: the model, with any folders in it.
        target: an empty folder.

    Raises:
        ValueError: there is no such table, or one is damaged.
        OSError: a file cannot be read or written.
    """
    folders = sorted({path.parent for path in folder.rglob("*.safetensors")})
    checkpoints = [each for each in map(Checkpoint, folders) if each.owners]
    if not checkpoints:
        hint = "; of its weights only safetensors files are read" if any(folder.rglob("*.bin")) else ""
        raise ValueError(f"path: expected a model with a packed table, found none in {folder}{hint}")
    if not any(each.first for each in checkpoints):
        raise ValueError(f"path: the packed tables of {folder} are of the second edition already")
    conversions = [Conversion(each) for each in checkpoints if each.first]
    rewritten = {path for each in conversions for path in each.rewritten()}

    def not_copied(place: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(place, name) in rewritten]

    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=not_copied)
    for each in conversions:
        each.write(target / each.checkpoint.folder.relative_to(folder))
    return [table for each in conversions for table in each.tables.values()]


def _facts(converted: ConvertedTable) -> dict[str, Any]:
    return {
        "converted from": FORMAT.earlier[0],
        "direction error of the conversion": converted.direction_error,
        "squared error of the conversion": converted.squared_error,
    }


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config of a model with compressed tables; None without one."""
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        described = config.get("quantization_config") if isinstance(config, dict) else None
        if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
            return None
        EmbkernConfig(**described)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _of_first_edition(state: TableState) -> bool:
    return state.shapes.get("levels") == list(first_edition.LEVELS_SHAPE)


def _as_transformers(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
