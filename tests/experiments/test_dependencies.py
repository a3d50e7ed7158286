"""Hashes of code and of files: what changes them, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from embkern.experiments import dependencies
from embkern.experiments.dependencies import code_hash, model_fingerprint, text_fingerprint
from embkern.methods import METHODS

SOURCES = {
    "__init__.py": "from .methods import svd",
    "methods/__init__.py": "from . import svd, other",
    "methods/svd.py": """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        import torch
        from ..tables import checked
        from .base import read
        if TYPE_CHECKING:
            from .typing_only import Kind
        def svd():
            from lab import lazily
        LEVELS = "levels.txt"
        """,
    "methods/base.py": "import lab.io.tensors as tensors",
    "methods/other.py": "",
    "methods/typing_only.py": "",
    "tables/__init__.py": "from .checks import checked",
    "tables/checks.py": "from ..ops.library import load",
    "io/__init__.py": "",
    "io/tensors.py": "",
    "lazily.py": "",
    "ops/__init__.py": "from . import project",
    "ops/project.py": "",
    "ops/library.py": "",
    "triton/project/kernels.py": "",
    "data/levels.txt": "1 2 3",
    "data/page.html": "",
}
OF_SVD = {
    "lab.methods.svd", "lab.methods.base", "lab.tables", "lab.tables.checks", "lab.ops.library",
    "lab.io.tensors", "lab.lazily", "triton/project/kernels.py", "_C.abi3.so", "data/levels.txt",
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package named lab, in place of embkern."""
    for name, source in SOURCES.items():
        path = tmp_path / "lab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in source.splitlines()), "utf-8")
    (tmp_path / "lab" / "_C.abi3.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(dependencies, "PACKAGE", "lab")
    monkeypatch.setattr(dependencies, "ROOT", tmp_path / "lab")
    return tmp_path / "lab"


def hash_now(*modules: str, follow: bool = True) -> str:
    return code_hash.__wrapped__(*modules, follow=follow)


def test_imports_are_followed_to_every_file_a_method_loads(package):
    found = dependencies._source_files(["lab.methods.svd"], True, "lab", package)
    assert found.keys() == OF_SVD
    assert dependencies._source_files(["lab.methods.svd"], False, "lab", package).keys() == {
        "lab.methods.svd"
    }
    assert "lab.ops.project" in dependencies._source_files(["lab.ops"], True, "lab", package)


@pytest.mark.parametrize("name", [*SOURCES, "_C.abi3.so"])
def test_the_hash_changes_with_these_files_and_no_others(package, name):
    followed, alone = hash_now("lab.methods.svd"), hash_now("lab.methods.svd", follow=False)
    path = package / name
    path.write_bytes(path.read_bytes() + b"\n# changed\n")
    module = "lab." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert (hash_now("lab.methods.svd") != followed) == bool({module, name} & OF_SVD)
    assert (hash_now("lab.methods.svd", follow=False) != alone) == (name == "methods/svd.py")


def test_line_endings_do_not_matter_and_names_do(package):
    before = hash_now("lab.methods.svd")
    path = package / "methods" / "svd.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert hash_now("lab.methods.svd") == before
    assert hash_now("lab.lazily", follow=False) != hash_now("lab.io", follow=False), "both files are empty"


def test_the_version_stands_for_missing_sources(package, monkeypatch):
    monkeypatch.setattr(dependencies, "__version__", "7")
    (package / "methods" / "base.py").unlink()
    (package / "methods" / "__init__.py").unlink()  # else `base` could be a name in it
    assert hash_now("lab.methods.svd") == "version:7"
    assert hash_now("lab.methods.svd", follow=False).startswith("sha256:")
    assert hash_now("no_such_module") == "version:7"


def test_methods_follow_from_their_own_modules_and_not_from_each_other():
    files = {
        name: dependencies._source_files([method.compress.__module__], True, "embkern", dependencies.ROOT)
        for name, method in METHODS.items()
    }
    for name, method in METHODS.items():
        assert method.compress.__module__ in files[name]
        others = {each.compress.__module__ for each in METHODS.values()} - {method.compress.__module__}
        starts = {"autoencoder": "svd", "fwsvd": "direction", "tfwsvd": "direction"}  # where they begin
        shared = {METHODS[starts[name]].compress.__module__} if name in starts else set()
        assert others & files[name].keys() == shared, name
    assert "data/packed_levels.txt" in files["allocate"]
    assert "triton/gather_project/forward.py" in files["svd"]


def test_a_module_outside_the_package_is_hashed_where_it_was_loaded_from():
    assert hash_now(__name__).startswith("sha256:")
    assert hash_now(__name__) != hash_now(__name__, follow=False)


# ---- files -----------------------------------------------------------------------------------------------


def test_a_model_is_its_weights_configs_and_tokenizer(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"12")
    (tmp_path / "two" / "README.md").write_text("a model")
    (tmp_path / "two" / "embkern_report.json").write_text("{}")
    one = model_fingerprint(tmp_path / "one")
    assert model_fingerprint(tmp_path / "two") == one
    (tmp_path / "two" / "model.safetensors").write_bytes(b"13")
    assert model_fingerprint(tmp_path / "two") != one
    assert model_fingerprint("of/hub") == "of/hub"
    assert model_fingerprint("of/hub", "c0ffee") == "of/hub@c0ffee"


def test_a_text_is_its_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    of_file = text_fingerprint(tmp_path / "a.txt")
    assert text_fingerprint(tmp_path) == of_file, "a directory is its files"
    (tmp_path / "b.txt").write_text("two")
    assert text_fingerprint(tmp_path) != of_file
    (tmp_path / "a.txt").write_text("eno")
    assert text_fingerprint(tmp_path / "a.txt") != of_file
    assert text_fingerprint("name:config:split:column") == "name:config:split:column"
