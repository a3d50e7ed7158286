"""One recipe behind the flags of the command line, a YAML file and the Python call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .factors import Factors
from .layer import check_rank
from .methods import METHODS, rank_for_ratio
from .methods.base import Rows, parse_options

LMHead = Literal["factorized", "dense"]


class Recipe(BaseModel):
    """What to do to a table: the method, its options, and how small the result must be.

    Give exactly one of ``ratio`` and ``rank``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field("autoencoder", description=f"one of {', '.join(METHODS)}")
    ratio: float | None = Field(None, description="bytes of the table over bytes of what replaces it")
    rank: int | None = Field(None, strict=True, description="r, the width of the codes")
    lm_head: LMHead = Field(
        "factorized",
        description="a tied head: factorized shares the factors, dense keeps the original table",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("expected exactly one of ratio and rank")
        if self.ratio is not None and not self.ratio >= 1:
            raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {self.ratio}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        parse_options(METHODS[self.method].options, self.options, self.method)
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Recipe:
        """Return itself: it is frozen, and torch.compile cannot trace pydantic's copy of a model's config."""
        return self

    @classmethod
    def parse(cls, **fields: Any) -> Recipe:
        """Build a recipe; a ValueError names each field that is wrong, what was expected and what came."""
        return parse_options(cls, fields, "recipe")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, **overrides: Any) -> Recipe:
        """Read a YAML mapping of the fields above; ``overrides`` win, and ``options`` are merged.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a mapping of a recipe's fields, or one of them is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"recipe: expected a YAML file, found none at {path}")
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        return cls.parse(**{**fields, **overrides})

    def rank_for(self, num_embeddings: int, embedding_dim: int) -> int:
        """Return the rank this recipe gives a (V, H) table; ValueError if it has none."""
        if self.rank is not None:
            check_rank(self.rank, embedding_dim)
            return self.rank
        assert self.ratio is not None
        method = METHODS[self.method]
        offset = method.has_offset(method.options(**self.options))
        return rank_for_ratio(num_embeddings, embedding_dim, self.ratio, offset=offset)

    def factorize(self, table: Rows, **run: Any) -> Factors:
        """Compress a table (V, H); ``run`` goes to the method (``progress``, ``checkpoint``, ...).

        A ``TableFile`` is for the autoencoder alone.
        """
        rank = self.rank_for(*table.shape)
        return METHODS[self.method].compress(table, rank, **self.options, **run)
