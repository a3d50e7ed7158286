"""Loading without ``import embkern``: right where embkern is installed, an error where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

import embkern
from embkern.models.loading import load_model
from embkern.models.static_embeddings import _module_classes, load_static
from tests.example_models import MODELS, build, word_tokenizer
from tests.models.compressing import compressed
from tests.saved_models import SVD

ROOT = Path(__file__).parents[2]
LOAD = """
import sys
import torch

def automodel(directory):
    from transformers import AutoModel, AutoTokenizer
    inputs = AutoTokenizer.from_pretrained(directory)("red green blue", return_tensors="pt")
    return AutoModel.from_pretrained(directory)(inputs["input_ids"]).last_hidden_state[0]

def pipeline(directory):
    from transformers import pipeline
    return torch.tensor(pipeline("feature-extraction", model=directory)("red green blue"))[0]

def sentence_transformer(directory):
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(directory, device="cpu")
    return model.encode("red green blue", output_value="token_embeddings", convert_to_tensor=True)

def static(directory):
    from sentence_transformers import SentenceTransformer
    return SentenceTransformer(directory, device="cpu").encode("red green blue", convert_to_tensor=True)

found = {}
for name in sys.argv[3:]:
    try:
        found[name] = globals()[name](sys.argv[1]).detach()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
found["imported"] = "embkern" in sys.modules
torch.save(found, sys.argv[2])
"""


WAYS = ("automodel", "pipeline", "sentence_transformer")


@pytest.mark.usefixtures("quantizing")
@pytest.mark.parametrize("lm_head", ["factorized", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_without_embkern_refuses_every_model(tmp_path, monkeypatch, name, lm_head, kind):
    model = compressed(build(name), kind, lm_head=lm_head)
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "embkern")
    for architecture in (type(model), type(model.base_model)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            architecture.from_pretrained(tmp_path)


@pytest.fixture
def small(source, tmp_path) -> Path:
    embkern.compress(source, **SVD, output=tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def small_bag(tmp_path) -> Path:
    library = pytest.importorskip("sentence_transformers")
    static, _ = _module_classes()
    tokenizer, rows = word_tokenizer().backend_tokenizer, torch.randn(600, 48)
    model = library.SentenceTransformer(modules=[static(tokenizer, embedding_weights=rows)])
    embkern.compress(model, ratio=4, output=tmp_path / "small")
    return tmp_path / "small"


def loaded(small: Path, tmp_path: Path, *ways: str, **environment: str) -> dict:
    """Run ``LOAD`` in a process; the installed metadata are those of the checkout."""
    pytest.importorskip("sentence_transformers")
    metadata = tmp_path / "site" / f"embkern-{embkern.__version__}.dist-info"
    metadata.mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: embkern\nVersion: {embkern.__version__}\n"
    (metadata / "METADATA").write_text(about)
    lines = ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, entries in project["entry-points"].items():
        lines += f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    (metadata / "entry_points.txt").write_text(lines)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    command = [sys.executable, "-c", LOAD, str(small), str(tmp_path / "found"), *ways]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "found")


@pytest.mark.slow
def test_torch_registers_an_installed_embkern(small, tmp_path):
    found = loaded(small, tmp_path, *WAYS)
    assert found.pop("imported")
    with torch.no_grad():
        expected = load_model(small).base_model(torch.tensor([[4, 5, 6]])).last_hidden_state[0]
    assert len(found) == 3
    for name, got in found.items():
        assert isinstance(got, torch.Tensor), f"{name}: {got}"
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_without_embkern_loading_is_an_error(small, tmp_path):
    found = loaded(small, tmp_path, *WAYS, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert not found.pop("imported")
    assert len(found) == 3
    for name, got in found.items():
        assert isinstance(got, str), f"{name} loaded a model with a random table"
        assert "ignore_mismatched_sizes" in got, f"{name}: {got}"


@pytest.mark.slow
def test_static_embeddings_with_and_without_embkern(small_bag, tmp_path):
    found = loaded(small_bag, tmp_path / "with", "static")
    expected = load_static(small_bag).encode("red green blue")
    assert found["imported"]
    assert_close(found["static"].cpu(), torch.from_numpy(expected))
    found = loaded(small_bag, tmp_path / "without", "static", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert not found["imported"]
    assert found["static"].startswith("KeyError"), found["static"]
