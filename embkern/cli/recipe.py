"""The recipe that a command's options describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe import Recipe


def recipe_of(file: Path | None, fields: dict[str, Any], options: dict[str, Any], **defaults: Any) -> Recipe:
    """Build a recipe from a YAML file and from the options that were given; those override the file."""
    from ..recipe import Recipe  # loads torch

    given = {name: value for name, value in fields.items() if value is not None}
    options = {name: value for name, value in options.items() if value is not None}
    if file is None:
        return Recipe.parse(**{**defaults, **given}, options=options)
    return Recipe.from_yaml(file, defaults, **given, options=options)
