"""Messages from the errors of other libraries."""

from __future__ import annotations

import errno

import pytest

from embkern.io.errors import disk_error, reason_of


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })',
    ],
)
def test_an_os_error_in_the_text_of_a_rust_library_is_found(text):
    assert disk_error(Exception(text)).errno == errno.ENOSPC


def test_other_errors_are_not_of_the_disk():
    assert disk_error(Exception("header too large")) is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError(" one\ntwo"), "one"), (TimeoutError(), "TimeoutError()"), (KeyError("x"), "'x'")],
)
def test_the_reason_is_the_first_line_or_the_type(error, reason):
    assert reason_of(error) == reason
