"""Hashes of what a result depends on: source code, models, texts and other files."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._version import __version__
from ..methods import METHODS
from ..text.counts import count_tokens
from ..text.frequencies import expected_frequencies
from ..text.prior import vocabulary_prior
from ..text.token_classes import adapted_prior

PACKAGE = "embkern"
ROOT = Path(__file__).parent.parent

# Code that a module loads without an import statement, as patterns in the package's directory.
_LOADED_BY_NAME = {"ops.library": ("triton/**/*.py", "_C*.so", "_C*.pyd")}

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*_Pooling/*.json")
_REPORT_FILES = ("embkern_report.json", "embkern_files.json")  # they change no output of the model


# ---- source code -----------------------------------------------------------------------------------------


@functools.cache
def code_hash(*modules: str, follow: bool = True) -> str:
    """Return a hash of the source files of modules.

    Args:
        modules: full names, such as ``embkern.methods.svd``.
        follow: also hash all modules of embkern that these import, directly or through others, including
            imports inside functions; the files of ``embkern/data`` that one of them names; and the kernels
            that the ops load by name (Triton's source files and the compiled extension). A package's
            ``__init__`` counts only if a name is imported from it. Imports for type checking do not count.

    Every byte of a source file counts, comments included; only line endings do not. Other packages, such as
    torch, and the C++ sources of the extension are not hashed. Where a source file is missing, the version of
    embkern is returned instead.
    """
    files = _source_files(modules, follow, PACKAGE, ROOT)
    if files is None:
        return f"version:{__version__}"
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        if path.suffix in (".py", ".txt"):
            content = content.replace(b"\r\n", b"\n")
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"sha256:{digest.hexdigest()[:16]}"


def method_code(name: str) -> str:
    """Return the hash of a method's module and of the modules that it imports."""
    return code_hash(METHODS[name].compress.__module__)


def frequencies_code() -> str:
    """Return the hash of the modules that count tokens and mix counts with the prior."""
    modules = {
        each.__module__ for each in (count_tokens, expected_frequencies, vocabulary_prior, adapted_prior)
    }
    return code_hash(*sorted(modules), follow=False)


def _source_files(modules: Iterable[str], follow: bool, package: str, root: Path) -> dict[str, Path] | None:
    """Return the source files of modules by name, None if one is missing."""
    files: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        path = _file_of(name, package, root)
        if path is None:
            return None
        files[name] = path
        if follow:
            source = path.read_text(encoding="utf-8")
            waiting += _imports(name, source, path.name == "__init__.py", package, root)
            loaded = [each for each in root.glob("data/*") if each.name in source]
            for pattern in _LOADED_BY_NAME.get(name.removeprefix(f"{package}."), ()):
                loaded += root.glob(pattern)
            files.update({str(each.relative_to(root)): each for each in loaded})
    return files


def _file_of(module: str, package: str, root: Path) -> Path | None:
    """Return the source file of a module; of one outside the package, that of the module as it was loaded."""
    first, *parts = module.split(".")
    if first != package:
        loaded = getattr(sys.modules.get(module), "__file__", None)
        return Path(loaded) if loaded is not None and Path(loaded).suffix == ".py" else None
    stem = root.joinpath(*parts)
    candidates = (stem / "__init__.py", stem.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def _imports(module: str, source: str, is_package: bool, package: str, root: Path) -> Iterator[str]:
    """Yield the modules of the package that a module imports."""
    parents = module.split(".")
    if not is_package:
        parents.pop()
    for node in _import_statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == package)
            continue
        above = parents[: len(parents) + 1 - node.level] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        if origin.split(".")[0] != package:
            continue
        for each in node.names:
            inner = f"{origin}.{each.name}"
            yield inner if _file_of(inner, package, root) is not None else origin


def _import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield all import statements but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _import_statements(ast.Module([other], []))
        else:
            yield from _import_statements(child)


# ---- files -----------------------------------------------------------------------------------------------


def model_fingerprint(source: str | os.PathLike, commit: str | None = None) -> str:
    """Return a hash of a directory's weights, configs and tokenizer; for a hub model, its name and commit."""
    if not Path(source).is_dir():
        return str(source) if commit is None else f"{source}@{commit}"
    found = {path for pattern in _MODEL_FILES for path in Path(source).glob(pattern) if path.is_file()}
    return files_fingerprint(path for path in sorted(found) if path.name not in _REPORT_FILES)


def text_fingerprint(source: str | os.PathLike) -> str:
    """Return a hash of a file or of the files in a directory; for a data set, return its name."""
    path = Path(source)
    if path.is_dir():
        return files_fingerprint(sorted(each for each in path.rglob("*") if each.is_file()))
    return files_fingerprint([path]) if path.exists() else str(source)


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files; their directory does not matter."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:32]}"
