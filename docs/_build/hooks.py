"""Puts the results of the benchmarks, which lie beside docs/, on the site, and points links at them."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
SHOWN = ("benchmarks/paper.md", "benchmarks/results/*")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, pictures and data."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the repository docs/ is a level deeper than on the site."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")
