"""What a study is asked: one object behind the command line and the Python call."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..evaluate.perplexity import usable_device
from ..methods.base import parse_options
from ..recipe import Recipe
from ..rivals import ALL_METHODS, RIVALS, ComparisonRecipe


@dataclass(frozen=True)
class Spec:
    """A method as it is asked for: ``NAME``, or ``NAME:option=value,...``."""

    text: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str, seed: int) -> Spec:
        """Read one; a method that draws takes the study's seed unless it has its own.

        Raises:
            ValueError: there is no such method, or its options are not a list of ``option=value``.
        """
        name, _, listed = text.partition(":")
        try:
            options = yaml.safe_load(f"{{{listed.replace('=', ': ')}}}")
        except yaml.YAMLError:
            options = None
        if name not in ALL_METHODS or not isinstance(options, dict) or None in options.values():
            raise ValueError(
                "methods: expected NAME or NAME:option=value,... with NAME one of "
                f"{', '.join(ALL_METHODS)}, got {text!r}"
            )
        if "seed" in ALL_METHODS[name].options.model_fields:
            options.setdefault("seed", seed)
        return cls(text, name, options)

    @property
    def installable(self) -> bool:
        """Whether a model can hold what the method makes."""
        return self.name not in RIVALS

    def recipe(self, ratio: float) -> Recipe:
        """Return the recipe of this method at a ratio."""
        return ComparisonRecipe.parse(method=self.name, ratio=ratio, options=self.options)


class Asked(BaseModel):
    """What a study is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a directory, or a name on the hub")
    output: Path = Field(description="directory of the report")
    ratios: list[float] = Field(
        [5.0, 10.0, 16.0, 32.0], min_length=1, description="bytes of the table over bytes of what replaces it"
    )
    methods: list[str] = Field(
        ["svd", "autoencoder", "direction", "allocate"],
        min_length=1,
        description="NAME or NAME:option=value,...; those that no model can hold are not timed",
    )
    dataset: str | None = Field(
        None, description="a file, directory or data set: perplexity of a language model on it"
    )
    max_tokens: int | None = Field(None, ge=1, description="of the data set that are read")
    max_length: int | None = Field(None, ge=2, description="tokens that a language model reads at once")
    stride: int | None = Field(None, ge=1, description="causal: tokens by which it goes on")
    separator: Literal["newline", "eos"] | None = Field(
        None, description="causal: between texts, newline by default"
    )
    line_filter: Literal["authors"] | None = Field(None, description="masked: that of the paper's authors")
    text: Path | None = Field(None, description="sentences, one a line: compares their embeddings")
    counts: Path | None = Field(None, description="token frequencies, a file of `embkern count`")
    count_text: list[str] = Field([], description="text to count as well, see embkern.compress")
    words: list[str] = Field([], description="whose neighbours are listed; default: frequent and rare ones")
    device: str | None = Field(None, description="such as cuda; the CPU by default")
    seed: int = Field(0, description="of methods that draw, and of what is sampled")
    keep_models: bool = Field(False, description="save the compressed models, in `models`")

    @field_validator("ratios", "methods", "words")
    @classmethod
    def _once(cls, values: list) -> list:
        return list(dict.fromkeys(values))

    @classmethod
    def parse(cls, **fields: Any) -> Asked:
        """Build one; a ValueError names each field, method or option that is wrong, and what was expected."""
        asked = parse_options(cls, fields, "compare")
        for spec, ratio in itertools.product(asked.specs(), asked.ratios):
            spec.recipe(ratio)
        usable_device(asked.device)
        return asked

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings of ``evaluate_perplexity``."""
        names = ("seed", "max_tokens", "max_length", "stride", "separator", "line_filter")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def specs(self) -> list[Spec]:
        """Return the methods with their options."""
        return [Spec.parse(text, self.seed) for text in self.methods]

    def command(self, row: str | None = None) -> str:
        """Return the command line that asks this; with an id, the one that measures one row again."""
        parts = ["embkern", "compare", self.model]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in ("model", "output") or (value == field.default and name not in ("ratios", "methods")):
                continue
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [] if value is True else [value]
            parts += [flag, *map(_written, values)]
        parts += ["-o", str(self.output)]
        return " ".join(map(_quoted, [*parts, *(["--row", row] if row else [])]))


def _written(value: Any) -> str:
    """Write a value as one types it: 5 for a ratio of 5.0, text as it is."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _quoted(word: str) -> str:
    """Quote a word for a shell, what cannot be seen as an escape."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + word.encode("unicode_escape").decode().replace("'", "\\'") + "'"
