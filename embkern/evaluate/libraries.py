"""The output of optional packages on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..io.optional import require


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' messages on new heads, and the progress bars of transformers and datasets."""
    from transformers.utils import logging

    datasets = require("datasets")
    verbosity = logging.get_verbosity()
    bars, more_bars = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if more_bars:
            datasets.enable_progress_bars()
