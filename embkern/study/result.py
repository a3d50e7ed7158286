"""The result of a study."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from .rows import Row
from .spec import StudyOptions

PAGE_NAME = "report.html"


class Study(BaseModel):
    """All rows of a study, with its options."""

    model: str = Field(description="a hub name, or the last part of a directory's path")
    command: str
    options: StudyOptions
    rows: list[Row]
    measured: int = Field(description="number of rows that this run measured")
    seconds: float

    @property
    def page(self) -> Path:
        """The path of the HTML report."""
        return self.options.output / PAGE_NAME
