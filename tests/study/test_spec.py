"""The options of a study, and the command line that repeats it."""

from __future__ import annotations

import pytest

from tests.study import REQUIRED

for package in REQUIRED:
    pytest.importorskip(package)
from embkern.study import StudyOptions


def test_settings_of_perplexity_are_in_the_protocol_and_in_the_command():
    given = dict(separator="eos", stride=7, line_filter="authors", max_tokens=99)
    options = StudyOptions.parse(model="m", output="o", seed=3, **given)
    assert options.protocol == {"seed": 3, **given}
    for option in ("--separator eos", "--stride 7", "--line-filter authors", "--max-tokens 99"):
        assert option in options.command()


def test_the_command_holds_text_unchanged():
    given = dict(dataset="data.0", words=["3.0"], methods=["allocate:exponent=1.0"])
    command = StudyOptions.parse(model="m", output="o", ratios=[5, 2.5], **given).command()
    for option in ("--dataset data.0", "--words 3.0", "--methods allocate:exponent=1.0", "--ratios 5 2.5"):
        assert f"{option} -" in command
