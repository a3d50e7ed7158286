"""What the sources and files of the project ask of its dependencies, against the bounds that it declares."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if not (ROOT / "pyproject.toml").exists() or not (ROOT / "csrc").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

# Every name that csrc takes from torch's headers. Each was compiled against torch 2.10's, the lower bound; add
# a name only when it has been, for the macros and functions of newer headers compile here and not there.
NAMES_IN_TORCH_2_10 = {
    "AOTI_TORCH_SUCCESS",
    "STABLE_TORCH_LIBRARY_IMPL",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_device_type_cpu",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "torch::headeronly::BFloat16",
    "torch::headeronly::Half",
    "torch::headeronly::ScalarType",
    "torch::headeronly::toString",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::contiguous",
    "torch::stable::detail::from",
    "torch::stable::detail::to",
    "torch::stable::get_num_threads",
    "torch::stable::new_empty",
    "torch::stable::parallel_for",
}


def code_of(source: Path) -> str:
    """Return a C++ source without its comments and the paths that it includes."""
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
