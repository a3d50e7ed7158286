"""Recipes: a method, its options and a target size, from Python, a YAML file or the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from .methods import METHODS, rank_for_ratio
from .methods.base import Rows, parse_options
from .methods.calibration import Calibration
from .tables.factors import check_rank

LMHead = Literal["factorized", "dense"]
Tables = Mapping[str, float | None] | Sequence[str]
DEFAULT_METHOD = "allocate"


class Recipe(BaseModel):
    """How to compress a table: the method, its options, and the size of the result.

    Exactly one of ``ratio`` and ``rank`` is given, or a ratio for every one of ``tables``; methods whose size
    is a number of bytes take a ratio. ``prune`` needs neither where it knows which tokens are read.

    Raises:
        pydantic.ValidationError: a field is unknown or wrong; ``Recipe.parse`` raises a plain ValueError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(DEFAULT_METHOD, description=f"one of {', '.join(METHODS)}")
    ratio: float | None = Field(None, description="bytes of the table over bytes of what replaces it")
    rank: int | None = Field(None, strict=True, description="r, the width of the codes")
    lm_head: LMHead = Field(
        "factorized",
        description="tied head: factorized shares the compressed table, dense keeps the original one",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    calibrate: bool | None = Field(
        None,
        strict=True,
        description="without a calibration or text for one: whether to calibrate on samples of the model "
        "itself; default: for causal language models, if it takes less than ten minutes",
    )
    calibration: str | None = Field(
        None,
        exclude=True,
        description="file of a calibration, which `embkern calibrate` writes; it is not saved with a model",
    )

    tables: dict[str, float | None] | None = Field(
        None,
        description="names or patterns of the tables to compress, each with a ratio of its own or null; a "
        "list of names will do; default: the input table",
    )

    @field_validator("tables", mode="before")
    @classmethod
    def _named_tables(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {value: None}
        if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
            return dict.fromkeys(value)
        return value

    @field_validator("calibration", mode="before")
    @classmethod
    def _path_of_calibration(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"expected the path of a file, got {type(value).__name__}")
        return value if value is None else os.fspath(value)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.tables is not None and not self.tables:
            raise ValueError("tables: expected at least one name or pattern, got none")
        own = [ratio for ratio in (self.tables or {}).values() if ratio is not None]
        if self.rank is not None and own:
            raise ValueError(f"tables: expected no ratios with a rank, got {own[0]:g}")
        sized = bool(own) and len(own) == len(self.tables or {})
        method = METHODS[self.method]
        sized = sized or (method.sizes_itself and self.ratio is None)
        if (self.ratio is None) == (self.rank is None) and not (sized and self.rank is None):
            raise ValueError("expected exactly one of ratio and rank")
        for ratio in (self.ratio, *own):
            if ratio is not None and not ratio >= 1:
                raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {ratio}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if self.rank is not None and method.sized_by == "ratio":
            ranked = ", ".join(name for name, each in METHODS.items() if each.sized_by == "rank")
            raise ValueError(
                f"rank: expected a ratio with method {self.method!r}, got {self.rank}; for a rank: {ranked}"
            )
        parse_options(method.options, self.options, self.method)
        if self.calibrate:
            self.check_calibrated("calibrate")
        if self.calibration is not None:
            self.check_calibrated("calibration")
            if self.calibrate is not None:
                raise ValueError("calibration: expected it without calibrate, got both")
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Recipe:
        """Return itself: recipes are frozen, and torch.compile cannot trace pydantic's copy of a config."""
        return self

    @classmethod
    def parse(cls, **fields: Any) -> Recipe:
        """Return ``Recipe(**fields)``.

        Raises:
            ValueError: fields are wrong; the message has each field, what was expected and what was given.
        """
        return parse_options(cls, fields, "recipe")

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike, defaults: dict[str, Any] | None = None, **overrides: Any
    ) -> Recipe:
        """Return the recipe of a YAML file, a mapping of the fields above.

        Args:
            path: the file.
            defaults: fields for which neither the file nor ``overrides`` has a value.
            overrides: fields that replace those of the file; ``options`` are merged.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a mapping of a recipe's fields, or a field is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"recipe: expected a YAML file, found none at {path}")
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except RecursionError:
            raise ValueError(f"recipe: {path} is not readable YAML (nested too deep)") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"recipe: {path} is not readable YAML ({error})") from None
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise ValueError(f"recipe: expected a mapping of field names in {path}, got {fields!r}")
        if overrides.get("ratio") is not None or overrides.get("rank") is not None:
            fields.pop("ratio", None)
            fields.pop("rank", None)
        for name, other in (("calibrate", "calibration"), ("calibration", "calibrate")):
            if overrides.get(name) is not None:
                fields.pop(other, None)
        options = fields.get("options") or {}
        if not isinstance(options, dict):
            raise ValueError(f"recipe: options: expected a mapping in {path}, got {options!r}")
        overrides["options"] = {**options, **overrides.get("options", {})}
        return cls.parse(**{**(defaults or {}), **fields, **overrides})

    @classmethod
    def of_arguments(cls, recipe: Recipe | None, **fields: Any) -> Recipe:
        """Return ``recipe``, or one of other arguments that are not None.

        Raises:
            ValueError: both are given, or a field is wrong.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        if recipe is None:
            return cls.parse(**given)
        if given:
            raise ValueError(f"recipe: expected either a recipe or {', '.join(given)}, got both")
        return recipe

    def for_all_rows(self) -> Recipe:
        """Return the recipe for a table of which it is not known which rows are read."""
        options = {name: value for name, value in self.options.items() if name != "unseen"}
        return self.model_copy(update={"options": options})

    def with_ratio(self, ratio: float | None) -> Recipe:
        """Return the recipe with another ratio; itself for None."""
        return self if ratio is None else self.model_copy(update={"ratio": ratio})

    @property
    def makes_packed_tables(self) -> bool:
        """Whether the method makes packed tables, of all rows."""
        return METHODS[self.method].packed and not self.leaves_rows_out

    @property
    def leaves_rows_out(self) -> bool:
        """Whether the method is to quantise the rows that are read, and not to store the others."""
        return self.options.get("unseen", "allocate") != "allocate"

    @property
    def calibrated(self) -> bool:
        """Whether the method takes a calibration."""
        return METHODS[self.method].calibrated

    def check_calibrated(self, argument: str) -> None:
        """Raise the ValueError of an argument that the method cannot use unless it takes a calibration."""
        if not self.calibrated:
            usable = ", ".join(name for name, each in METHODS.items() if each.calibrated)
            raise ValueError(f"{argument}: expected with method {usable} only, got method {self.method!r}")

    def check_fisher(self) -> None:
        """Raise ValueError unless the method takes Fisher weights, and the table is that of the input."""
        if METHODS[self.method].of_fisher is None:
            usable = ", ".join(name for name, each in METHODS.items() if each.of_fisher)
            raise ValueError(f"fisher: expected with method {usable} only, got method {self.method!r}")
        if self.tables is not None and set(self.tables) != {"input"}:
            raise ValueError(f"fisher: expected the input table only, got {', '.join(self.tables)}")

    def check_distributed(self) -> None:
        """Raise ValueError unless the method can divide the rows of a table among processes."""
        if not METHODS[self.method].distributed:
            usable = ", ".join(name for name, each in METHODS.items() if each.distributed)
            raise ValueError(f"world: expected with method {usable} only, got method {self.method!r}")

    def compresses_head(self, tied: bool) -> bool:
        """Return whether an output head will use the compressed table, if it is tied to the dense one."""
        return tied and self.lm_head == "factorized"

    def rank_for(self, num_embeddings: int, embedding_dim: int) -> int:
        """Return the rank of the result for a (V, H) table.

        Raises:
            ValueError: the rank exceeds H, no rank has the ratio, or the method makes no factors.
        """
        if self.rank is not None:
            check_rank(self.rank, embedding_dim)
            return self.rank
        assert self.ratio is not None
        method = METHODS[self.method]
        if method.sized_by == "ratio":
            raise ValueError(f"rank: tables of method {self.method!r} have no rank")
        offset = method.has_offset(method.options(**self.options))
        return rank_for_ratio(num_embeddings, embedding_dim, self.ratio, offset=offset)

    def factorize(
        self,
        table: Rows,
        counts: Tensor | None = None,
        *,
        read: Tensor | None = None,
        calibration: Calibration | None = None,
        tied: bool = True,
        fisher: Tensor | None = None,
        **run: Any,
    ) -> Any:
        """Compress a table (V, H) with the method.

        Args:
            table: a tensor, or a ``TableFile`` for methods that read one, such as the autoencoder.
            counts: token frequencies (V,), float64; methods without weights ignore them.
            read: which tokens a text has, (V,) bool, for methods that take it; others ignore it.
            calibration: what the model's output depends on, for methods that take it; others ignore it.
            tied: whether an output head uses the dense table.
            fisher: Fisher weights (V, H), for methods that take them; others ignore them.
            run: further arguments of the method (``progress``, ``checkpoint``, ...).

        Returns:
            Factors, a PackedTable or a RowTable.
        """
        method = METHODS[self.method]
        if fisher is not None and method.of_fisher is not None:
            run.update(method.of_fisher(method.options(**self.options), fisher))
        if method.weighted and "row_weight" not in run:
            run["counts"] = counts
        if calibration is not None and method.calibrated:
            run.update(calibration=calibration, tied=self.compresses_head(tied))
        if method.observed:
            run["read"] = read
        if method.sized_by == "ratio":
            return method.compress(table, ratio=self.ratio, **self.options, **run)
        return method.compress(table, self.rank_for(*table.shape), **self.options, **run)
