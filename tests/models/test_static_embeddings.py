"""Models of sentence-transformers: encoders and static embeddings, compressed, saved and loaded."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

T = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
from tokenizers import Tokenizer

import embkern
from embkern import PackedEmbedding, PackedEmbeddingBag
from embkern.io.mapped_table import TableFile
from embkern.models.find_table import UnsupportedModelError
from embkern.models.report import read_report
from embkern.models.static_embeddings import _module_classes
from tests.conftest import seed_of
from tests.example_models import H, tiny_bert, word_tokenizer
from tests.mapped_memory import mapped_file

TEXTS = ["red green", "blue blue red", "", "green blue red green"]
WORDS = 7


@pytest.fixture
def static():
    torch.manual_seed(seed_of(0))
    embedding, normalize = _module_classes()
    tokenizer = word_tokenizer().backend_tokenizer
    weights = torch.randn(600, 48)  # rows beyond the words make the table large enough for its fixed parts
    return sentence_transformers.SentenceTransformer(
        modules=[embedding(tokenizer, embedding_weights=weights), normalize()]
    )


@pytest.fixture
def encoder(tmp_path):
    tiny_bert(vocab_size=600, intermediate_size=8).save_pretrained(tmp_path / "bert")
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "bert")
    return sentence_transformers.SentenceTransformer(str(tmp_path / "bert"))


def cosines(one, other) -> np.ndarray:
    return (one * other).sum(1)


def test_static_embeddings_are_not_calibrated(static):
    with pytest.raises(UnsupportedModelError, match="calibrate: expected .* got static embeddings"):
        embkern.calibrate(static, static.tokenizer, TEXTS)


def test_static_embeddings_become_a_packed_bag(static, tmp_path):
    before = static.encode(TEXTS)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(each for each in TEXTS if each))
    weight = static[0].embedding.weight
    report = embkern.compress(static, ratio=4, output=tmp_path / "small", text=text)
    assert report.model is static
    assert isinstance(static[0].embedding, PackedEmbeddingBag)
    assert report.architecture == "SentenceTransformer"
    assert report.table_bytes == weight.nbytes == report.model_bytes_before
    assert report.ratio >= 4
    assert report.model_bytes_after == report.compressed_bytes
    assert report.counts == "the order of the vocabulary"
    assert report.sentences.mean_cosine > 0.99
    after = static.encode(TEXTS)
    assert after.dtype == np.float32
    assert (cosines(before, after)[[0, 1, 3]] > 0.99).all()
    assert not after[2].any(), "a text without tokens is a vector of zeros"

    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    assert np.array_equal(loaded.encode(TEXTS), after)
    assert loaded[0].get_embedding_dimension() == 48
    assert read_report(tmp_path / "small").compressed_bytes == report.compressed_bytes
    assert "SentenceTransformer(" in (tmp_path / "small" / "README.md").read_text()
    files = {path.name: path.read_bytes() for path in (tmp_path / "small").glob("model*")}
    assert list(files) == ["model.safetensors"]
    assert len(files["model.safetensors"]) < report.compressed_bytes + 1000
    for other in (loaded, pickle.loads(pickle.dumps(static))):
        other.save(str(tmp_path / "again"))
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == files["model.safetensors"]

    with pytest.raises(UnsupportedModelError, match="compressed already"):
        embkern.compress(static, ratio=4)
    embkern.export_dense(tmp_path / "small", tmp_path / "dense")
    dense = sentence_transformers.SentenceTransformer(str(tmp_path / "dense"))
    assert type(dense[0].embedding) is torch.nn.EmbeddingBag
    np.testing.assert_allclose(dense.encode(TEXTS), after, atol=1e-6)


def test_a_folder_of_static_embeddings(static, tmp_path):
    static.save(str(tmp_path / "dense"))
    expected = embkern.compress(static, ratio=4)
    report = embkern.compress(tmp_path / "dense", ratio=4, output=tmp_path / "small")
    assert report.source == "dense"
    assert report.compressed_bytes == expected.compressed_bytes
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    assert np.array_equal(loaded.encode(TEXTS), static.encode(TEXTS))


def test_a_folder_of_model2vec(static, tmp_path):
    """Its rows are those of a mapping times weights, and its config says whether results are normalised."""
    before = static.encode(TEXTS)
    weight, folder = static[0].embedding.weight.detach(), tmp_path / "model2vec"
    folder.mkdir()
    tensors = {
        "embeddings": weight.flip(0).contiguous() * 2,
        "mapping": torch.arange(599, -1, -1),
        "weights": torch.full((600,), 0.5),
    }
    save_file(tensors, folder / "model.safetensors")
    static[0].tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    report = embkern.compress(folder, ratio=4, output=tmp_path / "small")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    assert np.array_equal(loaded.encode(TEXTS), report.model.encode(TEXTS))
    assert (cosines(before, loaded.encode(TEXTS))[[0, 1, 3]] > 0.99).all()


def test_a_bag_is_frozen_until_it_is_to_be_trained(static, tmp_path):
    embkern.compress(static, ratio=4, output=tmp_path / "small")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    for model in (static, loaded):
        assert not any(each.requires_grad for each in model.parameters())
    before = static.encode(TEXTS)
    (changes,) = embkern.unfreeze_table(static, "input").values()
    bag, ids, target = static[0].embedding, torch.arange(12).view(4, 3), torch.randn(4, 48)
    optimizer = torch.optim.SGD([each for each in static.parameters() if each.requires_grad], 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (bag(ids) * target).sum().backward()
        optimizer.step()
    assert changes.scales.any()
    trained = static.encode(TEXTS)
    assert not np.allclose(trained, before, atol=1e-2)
    static.save(str(tmp_path / "trained"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "trained"))
    np.testing.assert_allclose(loaded.encode(TEXTS), trained, atol=2e-3)  # stored in 16 bits
    static.load_state_dict(static.state_dict())
    assert not changes.scales.any(), "the changes are in the table"
    assert np.array_equal(static.encode(TEXTS), loaded.encode(TEXTS))
    embkern.freeze_table(static)
    assert bag.adjustment is None
    with pytest.raises(RuntimeError, match="weight: expected no write"):
        bag.weight[3] = 0


def test_a_damaged_bag_is_refused(static, tmp_path):
    embkern.compress(static, ratio=4, output=tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="the saved embedding is damaged: .* was changed after it was saved"):
        sentence_transformers.SentenceTransformer(str(tmp_path / "small"))


def test_what_static_embeddings_cannot_be(static):
    with pytest.raises(ValueError, match="method: expected one that makes packed tables .*, got 'svd'"):
        embkern.compress(static, method="svd", rank=3)
    with pytest.raises(ValueError, match="tables: expected none for static embeddings, got output"):
        embkern.compress(static, ratio=2, tables=["output"])
    static[0].embedding.max_norm = 1.0
    with pytest.raises(UnsupportedModelError, match="0.embedding renormalises rows"):
        embkern.compress(static, ratio=2)
    _, normalize = _module_classes()
    with pytest.raises(
        UnsupportedModelError, match="expected a SentenceTransformer whose first module .* Normalize"
    ):
        embkern.compress(sentence_transformers.SentenceTransformer(modules=[normalize()]), ratio=2)


def test_an_encoder_is_compressed_in_place_and_saved_whole(encoder, tmp_path):
    texts = [each for each in TEXTS if each]
    before = encoder.encode(texts)
    report = embkern.compress(encoder, ratio=4, output=tmp_path / "small")
    assert report.model is encoder
    assert isinstance(encoder[0].auto_model.get_input_embeddings(), PackedEmbedding)
    assert report.architecture == "BertModel"
    assert report.counts == "the order of the vocabulary"
    after = encoder.encode(texts)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    assert (cosines(before, after) / norms > 0.95).all()
    assert (tmp_path / "small" / "1_Pooling" / "config.json").is_file()
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    assert isinstance(loaded[0].auto_model.get_input_embeddings(), PackedEmbedding)
    np.testing.assert_allclose(loaded.encode(texts), after, atol=1e-6)
    assert T.AutoModel.from_pretrained(tmp_path / "small").get_input_embeddings().embedding_dim == H


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_a_loaded_bag_is_mapped(static, tmp_path):
    """Processes share the file's pages: the records are not copied."""
    embkern.compress(static, ratio=4, output=tmp_path / "small")
    bag = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))[0].embedding
    assert mapped_file(bag.records).startswith(str(tmp_path / "small"))


@pytest.mark.slow
def test_loading_in_a_fresh_process(static, tmp_path):
    """embkern may be imported before or after the library; without it, loading fails."""
    embkern.compress(static, ratio=4, output=tmp_path / "small")
    np.save(tmp_path / "expected.npy", static.encode(TEXTS))
    load = "from sentence_transformers import SentenceTransformer\n"
    use = (
        f"import numpy\nfound = SentenceTransformer({str(tmp_path / 'small')!r}).encode({TEXTS!r})\n"
        f"assert numpy.array_equal(found, numpy.load({str(tmp_path / 'expected.npy')!r}))\n"
    )
    blocked = "import sys\nsys.modules['embkern'] = None\n"
    for code, works in (
        (f"import embkern\n{load}{use}", True),
        (f"{load}import embkern\n{use}", True),
        (f"{blocked}{load}{use}", False),
    ):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == works, done.stderr


def test_a_file_of_one_table_beside_a_tokenizer(static, tmp_path):
    """wordllama has such files: ``embedding.weight`` in fp16, and a tokenizer without a model's config."""
    weights, tokenizer = tmp_path / "l2_256.safetensors", tmp_path / "l2_tokenizer_config.json"
    save_file({"embedding.weight": static[0].embedding.weight.detach().half()}, weights)
    static[0].tokenizer.save(str(tokenizer))
    before = static.encode(TEXTS)
    embedding, normalize = _module_classes()
    table = load_file(weights)["embedding.weight"].float()
    made = embedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=table)
    model = sentence_transformers.SentenceTransformer(modules=[made, normalize()])
    report = embkern.compress(model, ratio=8, output=tmp_path / "small")
    assert report.ratio >= 8
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"))
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert (cosines(before, loaded.encode(TEXTS))[[0, 1, 3]] > 0.95).all()
    packed = embkern.methods.allocate(TableFile(weights, "embedding.weight"), ratio=4)  # of fp16
    ids = torch.tensor([[4, 5, 6], [6, 6, 4]])
    expected = torch.nn.functional.embedding_bag(ids, table)
    found = PackedEmbeddingBag(packed, mode="mean")(ids)
    assert (torch.cosine_similarity(found.float(), expected) > 0.95).all()
