"""The package's imports: each file imports from its own layer and from those below, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "embkern"
# From the bottom up. What stands in one line shares a layer, in which the order of files is free of circles.
PRODUCT = [
    {"_registration", "_version"},
    {"io"},
    {"ops", "triton"},
    {"tables"},
    {"nn"},
    {"text"},
    {"methods"},
    {"fidelity"},
    {"recipe"},
    {"models"},
    {"api", "converting", "environment", "export", "inspection", "restoring", "train"},
]
LABORATORY = [{"experiments"}, {"evaluate"}, {"study"}]
COMMANDS = [{"cli"}, {"__main__"}]
LAYERS = [*PRODUCT, *LABORATORY, *COMMANDS]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    """Return a file's dotted name within the package; that of a package for its ``__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if name != "__init__"}  # it has the public names alone


def imported(name: str) -> dict[str, int]:
    """Return the modules of the package that a file imports anywhere, with the line of each."""
    path, found = FILES[name], dict[str, int]()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            assert not isinstance(node, ast.Import) or not any(
                alias.name.startswith("embkern") for alias in node.names
            ), f"{path}:{node.lineno}: expected relative imports within the package"
            continue
        if not node.level:
            assert not (node.module or "").startswith("embkern"), (
                f"{path}:{node.lineno}: expected a relative one"
            )
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        source = ".".join(part for part in base if part)
        for alias in node.names:
            submodule = f"{source}.{alias.name}".lstrip(".")
            found.setdefault(submodule if submodule in FILES else source, node.lineno)
    found.pop("", None)
    return found


def layer_of(module: str) -> int:
    return HEIGHT[module.partition(".")[0]]


def test_every_module_has_a_layer():
    assert {name.partition(".")[0] for name in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_goes_up(name):
    height = layer_of(name)
    for target, line in imported(name).items():
        assert target in MODULES, f"{FILES[name]}:{line}: there is no {target}"
        assert layer_of(target) <= height, (
            f"{FILES[name].relative_to(ROOT)}:{line}: {name} imports {target}, which is above it; "
            f"move what both need down, to one of {', '.join(sorted(set.union(*LAYERS[: height + 1])))}"
        )


def test_no_import_goes_in_a_circle():
    graph = {name: set(imported(name)) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"these files import each other: {' <- '.join(error.args[1])}") from None


def test_benchmarks_and_laboratory_are_not_imported_by_the_product():
    laboratory = set.union(*LABORATORY) | {"cli"}
    for name in MODULES:
        if name.partition(".")[0] in set.union(*PRODUCT):
            reached = {target.partition(".")[0] for target in imported(name)}
            assert not reached & laboratory, f"{name} imports {', '.join(reached & laboratory)}"


def test_a_wrong_edge_is_found(tmp_path, monkeypatch):
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from ..api import compress\n", encoding="utf-8")
    monkeypatch.setitem(FILES, "io.wrong", path)
    monkeypatch.setitem(MODULES, "io.wrong", path)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"wrong\.py:2: io\.wrong imports api, which is above it"):
        test_no_import_goes_up("io.wrong")
