"""A row of a study: one measurement, with what it depends on and the command that repeats it."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import ConfigDict, Field

from ..experiments.engine import Result
from ..experiments.environment import environment_in_words

DENSE = "dense"  # the method of rows about the dense model


class Row(Result):
    """One measurement. ``id`` is the hash of ``depends``."""

    model_config = ConfigDict(extra="forbid")

    id: str
    measure: str
    method: str
    ratio: float | None = Field(description="the ratio asked for")
    depends: dict[str, Any]
    command: str = Field(description="measures this row again, and no other")
    result: dict[str, Any] | None = None
    reason: str | None = Field(None, description="why there is no result")
    retry: bool = Field(False, description="the next run measures it, as a missing package may be there")
    seconds: float = Field(description="time to measure it, without the time that the method took")
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    environment: dict[str, str] = Field(default_factory=environment_in_words)

    def dependencies(self) -> dict[str, Any]:
        """Return everything that the result follows from."""
        return self.depends

    def is_final(self) -> bool:
        """Return whether the next run keeps the row."""
        return not self.retry
