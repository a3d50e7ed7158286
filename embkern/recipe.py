"""One recipe behind the flags of the command line, a YAML file and the Python call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from .methods import METHODS, Method, rank_for_ratio
from .methods.base import Rows, parse_options
from .tables.factors import check_rank

LMHead = Literal["factorized", "dense"]
DEFAULT_METHOD = "allocate"


class Recipe(BaseModel):
    """What to do to a table: the method, its options, and how small the result must be.

    Give exactly one of ``ratio`` and ``rank``; a method that is sized by bytes takes a ratio.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    known_methods: ClassVar[Mapping[str, Method]] = METHODS

    method: str = Field(DEFAULT_METHOD, description=f"one of {', '.join(METHODS)}")
    ratio: float | None = Field(None, description="bytes of the table over bytes of what replaces it")
    rank: int | None = Field(None, strict=True, description="r, the width of the codes")
    lm_head: LMHead = Field(
        "factorized",
        description="a tied head: factorized shares the compressed table, dense keeps the original one",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in cls.known_methods:
            raise ValueError(f"expected one of {', '.join(cls.known_methods)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("expected exactly one of ratio and rank")
        if self.ratio is not None and not self.ratio >= 1:
            raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {self.ratio}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        method = self.known_methods[self.method]
        if self.rank is not None and method.sized_by == "ratio":
            ranked = ", ".join(name for name, each in METHODS.items() if each.sized_by == "rank")
            raise ValueError(
                f"rank: expected a ratio with method {self.method!r}, got {self.rank}; for a rank: {ranked}"
            )
        parse_options(method.options, self.options, self.method)
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Recipe:
        """Return itself: it is frozen, and torch.compile cannot trace pydantic's copy of a model's config."""
        return self

    @classmethod
    def parse(cls, **fields: Any) -> Recipe:
        """Build a recipe; a ValueError names each field that is wrong, what was expected and what came."""
        return parse_options(cls, fields, "recipe")

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike, defaults: dict[str, Any] | None = None, **overrides: Any
    ) -> Recipe:
        """Read a YAML mapping of the fields above; ``overrides`` win, and ``options`` are merged.

        ``defaults`` are of fields that are given in neither.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a mapping of a recipe's fields, or one of them is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"recipe: expected a YAML file, found none at {path}")
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError(f"recipe: {path} is not readable YAML (nested too deep)") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"recipe: {path} is not readable YAML ({error})") from error
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise ValueError(f"recipe: expected a mapping of names in {path}, got {fields!r}")
        if overrides.get("ratio") is not None or overrides.get("rank") is not None:
            fields.pop("ratio", None)
            fields.pop("rank", None)
        options = fields.get("options") or {}
        if not isinstance(options, dict):
            raise ValueError(f"recipe: options: expected a mapping in {path}, got {options!r}")
        overrides["options"] = {**options, **overrides.get("options", {})}
        return cls.parse(**{**(defaults or {}), **fields, **overrides})

    def rank_for(self, num_embeddings: int, embedding_dim: int) -> int:
        """Return the rank this recipe gives a (V, H) table; ValueError if it has none, or one beyond H."""
        if self.rank is not None:
            check_rank(self.rank, embedding_dim)
            return self.rank
        assert self.ratio is not None
        method = self.known_methods[self.method]
        if method.sized_by == "ratio":
            raise ValueError(f"rank: method {self.method!r} is sized by bytes, its tables have no rank")
        offset = method.has_offset(method.options(**self.options))
        return rank_for_ratio(num_embeddings, embedding_dim, self.ratio, offset=offset)

    def factorize(self, table: Rows, counts: Tensor | None = None, **run: Any) -> Any:
        """Compress a table (V, H).

        Args:
            table: a ``TableFile`` is for the methods that read one, such as the autoencoder.
            counts: how often each token is read, (V,) float64; methods that are not weighted ignore it.
            run: goes to the method (``progress``, ``checkpoint``, ...).

        Returns:
            Factors or a PackedTable; what a method makes that is there for comparison.
        """
        method = self.known_methods[self.method]
        if method.weighted:
            run["counts"] = counts
        if method.sized_by == "ratio":
            return method.compress(table, ratio=self.ratio, **self.options, **run)
        return method.compress(table, self.rank_for(*table.shape), **self.options, **run)
