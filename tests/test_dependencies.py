"""The requirements of sources and configuration files against the declared bounds of dependencies."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from embkern.ops.library import reraise_native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parents[1]

if not (ROOT / "pyproject.toml").exists() or not (ROOT / "csrc").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

# The names that csrc uses from torch's headers. Each compiles with the headers of torch 2.10, the lower
# bound. Add a name only after compiling it with torch 2.10: those of newer headers compile in this
# environment, too.
NAMES_IN_TORCH_2_10 = {
    "AOTI_TORCH_SUCCESS",
    "STABLE_TORCH_LIBRARY_IMPL",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_device_type_cpu",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_dtype",
    "torch::headeronly::BFloat16",
    "torch::headeronly::Half",
    "torch::headeronly::ScalarType",
    "torch::headeronly::toString",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::contiguous",
    "torch::stable::copy_",
    "torch::stable::detail::from",
    "torch::stable::detail::to",
    "torch::stable::flatten",
    "torch::stable::get_num_threads",
    "torch::stable::new_empty",
    "torch::stable::new_zeros",
    "torch::stable::parallel_for",
}


def code_of(source: Path) -> str:
    """Return a C++ source without comments and include lines."""
    return re.sub(r"//.*|/\*.*?\*/|#include.*", "", source.read_text())


def test_sources_use_nothing_that_torch_2_10_lacks() -> None:
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".inl", ".cu", ".cuh"}
    ]
    used = set()
    for source in sources:
        used |= set(
            re.findall(
                r"\b(?:STABLE|STD|TORCH|AOTI|C10)_\w+\b(?=\s*\()|\bAOTI_\w+|\baoti_torch_\w+|\btorch(?:::\w+)+",
                code_of(source),
            )
        )
    assert used - NAMES_IN_TORCH_2_10 == set()
    assert "torch::stable::Tensor" in used


def run_setup(before: str) -> subprocess.CompletedProcess[str]:
    """Run ``setup.py --name`` after lines of Python that change its environment."""
    lines = f"import runpy, sys\n{before}\nsys.argv = ['setup.py', '--name']\nrunpy.run_path('setup.py')"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)


def test_an_older_setuptools_is_named() -> None:
    ran = run_setup("import setuptools; setuptools.__version__ = '65.5.1'")
    assert ran.returncode != 0
    assert ran.stderr.strip() == (
        'embkern: expected setuptools>=77, got 65.5.1; run: pip install "setuptools>=77"'
    )


@pytest.mark.parametrize("built_with", ["12.8", "13.2"])
def test_a_toolkit_of_another_major_version_disables_only_the_cuda_kernels(tmp_path, built_with) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    ran = run_setup(
        "import setuptools, torch; from torch.utils import cpp_extension\n"
        f"torch.version.cuda = {built_with!r}; cpp_extension.CUDA_HOME = {str(tmp_path)!r}\n"
        "cpp_extension.CUDAExtension = lambda *_, **__: sys.exit('CUDA sources')"
    )
    if built_with == "13.2":
        assert "CUDA sources" in ran.stderr
        return
    assert ran.returncode == 0, ran.stderr
    assert "building without CUDA kernels" in ran.stderr
    assert "CUDA 13.0, torch was built with CUDA 12.8" in ran.stderr


def test_constants_are_not_the_left_factor_of_a_tensor() -> None:
    """Triton's interpreter raises TypeError for ``constexpr * tensor`` in versions 3.7 and 3.8."""
    for path in (ROOT / "embkern" / "triton").glob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and ast.unparse(node.value).startswith("tl.constexpr(")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name) and node.left.id in constants:
                names = {each.id for each in ast.walk(node.right) if isinstance(each, ast.Name)}
                # Constants have names of capitals.
                assert all(map(str.isupper, names)), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_a_refused_argument_is_a_value_error_in_every_version_of_torch() -> None:
    """Torch 2.15 converts std::invalid_argument to RuntimeError."""
    with pytest.raises(ValueError, match="^directory: expected records"):
        reraise_native(RuntimeError("directory: expected records within their 160 words"))
    reraise_native(RuntimeError("out of memory"))
    reraise_native(IndexError("ids: expected 0 <= id < 3, got 9"))


def test_fields_that_begin_with_model_are_allowed() -> None:
    """pydantic before 2.10 warns about fields whose names begin with ``model_``."""
    for module in ("models.report", "inspection", "recipe", "train", "text", "study", "evaluate", "fidelity"):
        importlib.import_module(f"embkern.{module}")
    kinds, found = [BaseModel], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        names = [name for name in kind.model_fields if name.startswith("model_")]
        if kind.__module__.startswith("embkern") and names:
            found.add(kind.__name__)
            assert kind.model_config.get("protected_namespaces") == (), f"{kind}: {names}"
    assert found >= {"Summary", "Comparison"}


def requirements(extras: bool) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    asked = project["dependencies"] + [each for name in optional if extras for each in optional[name]]
    return [each for each in map(Requirement, asked) if each.name != "embkern"]


# Harnesses and other runtimes are optional in the tests' environments, and linters are pinned exactly.
WITHOUT_A_BOUND = {"lm-eval", "mteb", "clang-format", "mypy", "ruff", "types-PyYAML", "types-setuptools"}
WITHOUT_A_BOUND |= {"types-tqdm", "gguf", "onnx", "onnxruntime", "onnxscript"}


def test_every_dependency_of_the_tests_has_a_lower_bound() -> None:
    for requirement in requirements(extras=True):
        bounded = any(each.operator == ">=" for each in requirement.specifier)
        assert bounded != (requirement.name in WITHOUT_A_BOUND), requirement


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_dependency_on_every_python(python) -> None:
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.9"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert [each.operator for each in pin.specifier] == ["=="], line
            if pin.marker is None or pin.marker.evaluate(environment):
                pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    assert all(len(each) == 1 for each in pins.values()), "a package has two versions"
    tools = [Requirement(each) for each in ("pip", "setuptools>=77", "wheel", "ninja", "uv")]
    for requirement in [*requirements(extras=True), *tools]:
        if requirement.name in {"lm-eval", "mteb"}:
            continue
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement}: run make constraints"
        (version,) = (each.version for each in pins[name][0].specifier)
        assert requirement.specifier.contains(version), f"{requirement}, but constraints.txt has {version}"
