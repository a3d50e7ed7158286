"""Docstrings as Markdown: ``::`` before a block is a colon, and the block stays one."""

import re
from typing import Any

import griffe


class Blocks(griffe.Extension):
    """Rewrites every docstring once it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the colons of reStructuredText."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::\n\n", ":\n\n", obj.docstring.value)
