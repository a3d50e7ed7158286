"""The options of a study: one object behind the command line and the Python call."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..evaluate.language_model import usable_device
from ..methods import METHODS
from ..methods.base import parse_options
from ..recipe import Recipe


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, parsed from ``NAME`` or ``NAME:option=value,...``."""

    text: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str, seed: int) -> MethodSpec:
        """Parse a method; one that draws random numbers takes the study's seed unless it names its own.

        Raises:
            ValueError: there is no such method, or its options are not a list of ``option=value``.
        """
        name, _, listed = text.partition(":")
        try:
            options = yaml.safe_load(f"{{{listed.replace('=', ': ')}}}")
        except yaml.YAMLError:
            options = None
        if name not in METHODS or not isinstance(options, dict) or None in options.values():
            raise ValueError(
                "methods: expected NAME or NAME:option=value,... with NAME one of "
                f"{', '.join(METHODS)}, got {text!r}"
            )
        if "seed" in METHODS[name].options.model_fields:
            options.setdefault("seed", seed)
        return cls(text, name, options)

    def recipe(self, ratio: float) -> Recipe:
        """Return the recipe of this method at a ratio."""
        return Recipe.parse(method=self.name, ratio=ratio, options=self.options)


class StudyOptions(BaseModel):
    """What a study measures, and of which model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a directory, or a name on the hub")
    output: Path = Field(description="directory of the report")
    ratios: list[float] = Field(
        [5.0, 10.0, 16.0, 32.0], min_length=1, description="bytes of the table over bytes of what replaces it"
    )
    methods: list[str] = Field(
        ["svd", "autoencoder", "direction", "allocate"],
        min_length=1,
        description="NAME or NAME:option=value,...",
    )
    dataset: str | None = Field(
        None, description="text to measure the perplexity of a language model on: file, directory or data set"
    )
    max_tokens: int | None = Field(None, ge=1, description="number of tokens of the data set to read")
    max_length: int | None = Field(None, ge=2, description="tokens per window of a language model")
    stride: int | None = Field(None, ge=1, description="causal models: tokens between the starts of windows")
    separator: Literal["newline", "eos"] | None = Field(
        None, description="causal models: what separates texts, newline by default"
    )
    line_filter: Literal["authors"] | None = Field(
        None, description="masked models: the line filter of the paper's authors"
    )
    text: Path | None = Field(None, description="sentences, one per line, to compare the embeddings of")
    counts: Path | None = Field(None, description="token frequencies, a file of `embkern count`")
    count_text: list[str] = Field([], description="text to count token frequencies in, see embkern.compress")
    fisher: Path | None = Field(None, description="Fisher weights, a file of `embkern fisher`")
    words: list[str] = Field(
        [], description="words whose nearest neighbours are listed; default: some frequent and some rare ones"
    )
    device: str | None = Field(None, description="such as cuda; default: cpu")
    seed: int = Field(0, description="random seed of the methods and of every sample")
    keep_models: bool = Field(False, description="save the compressed models in `models`")

    @field_validator("ratios", "methods", "words")
    @classmethod
    def _without_duplicates(cls, values: list) -> list:
        return list(dict.fromkeys(values))

    @classmethod
    def parse(cls, **fields: Any) -> StudyOptions:
        """Validate options; a ValueError names each field, method or option that is wrong."""
        options = parse_options(cls, fields, "compare")
        for spec, ratio in itertools.product(options.specs(), options.ratios):
            spec.recipe(ratio)
        usable_device(options.device)
        return options

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings of ``evaluate_perplexity``."""
        names = ("seed", "max_tokens", "max_length", "stride", "separator", "line_filter")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def specs(self) -> list[MethodSpec]:
        """Return the methods with their options."""
        return [MethodSpec.parse(text, self.seed) for text in self.methods]

    def command(self, row: str | None = None) -> str:
        """Return the command line of this study; with a row's id, the one that measures that row again."""
        parts = ["embkern", "compare", self.model]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in ("model", "output") or (value == field.default and name not in ("ratios", "methods")):
                continue
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [] if value is True else [value]
            parts += [flag, *map(_argument, values)]
        parts += ["-o", str(self.output)]
        return " ".join(map(quoted, [*parts, *(["--row", row] if row else [])]))


def _argument(value: Any) -> str:
    """Format a value for the command line: 5 for a ratio of 5.0, text unchanged."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def quoted(word: str) -> str:
    """Quote a word for a shell, with escapes for characters that cannot be printed."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + word.encode("unicode_escape").decode().replace("'", "\\'") + "'"
