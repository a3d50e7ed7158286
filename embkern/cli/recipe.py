"""Recipes from the options of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe import Recipe


def tables_of(values: list[str] | None) -> dict[str, float | None] | None:
    """Return names of tables, each with its ratio or None, from ``NAME`` and ``NAME=RATIO``."""
    if not values:
        return None
    found: dict[str, float | None] = {}
    for value in values:
        name, given, ratio = value.partition("=")
        try:
            found[name] = float(ratio) if given else None
        except ValueError:
            raise ValueError(f"tables: expected NAME or NAME=RATIO, got {value!r}") from None
    return found


def options_of(values: list[str] | None) -> dict[str, Any]:
    """Return options of a method from ``NAME=VALUE``, with values as YAML has them."""
    import yaml

    found: dict[str, Any] = {}
    for value in values or []:
        name, given, text = value.partition("=")
        try:
            parsed = yaml.safe_load(text)
        except yaml.YAMLError:
            parsed = None
        if not name or not given or parsed is None:
            raise ValueError(f"option: expected NAME=VALUE, got {value!r}")
        found[name] = parsed
    return found


def recipe_of(file: Path | None, fields: dict[str, Any], options: dict[str, Any], **defaults: Any) -> Recipe:
    """Return the recipe of a YAML file and of options of the command, which override the file.

    Args:
        file: YAML file, or None.
        fields: fields of the recipe; None stands for an option that was not given.
        options: options of the method, likewise.
        defaults: fields for which neither the file nor ``fields`` has a value.
    """
    from ..recipe import Recipe  # imported here, as it loads torch

    given = {name: value for name, value in fields.items() if value is not None}
    options = {name: value for name, value in options.items() if value is not None}
    if file is None:
        return Recipe.parse(**{**defaults, **given}, options=options)
    return Recipe.from_yaml(file, defaults, **given, options=options)
