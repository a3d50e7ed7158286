"""The reference models: no text in two splits, models that transformers loads, runs that can be continued."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from benchmarks.tools import reference_models
from benchmarks.tools.installed_text import Document
from benchmarks.tools.reference_models import corpus, kinds, training
from embkern.io.checked_json import read_checked_json
from tests.benchmarks.tools.tales import tale

pytestmark = pytest.mark.slow

LOADERS = {"bert": AutoModelForMaskedLM, "gpt": AutoModelForCausalLM}
TINY = kinds.Recipe(steps=30, batch=4, layers=1, width=32, vocabulary=400, learning_rate=1e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The text of two hundred documents."""
    root = tmp_path_factory.mktemp("root")
    documents = [Document("tales", str(n), [tale(2 * n), tale(2 * n + 1)]) for n in range(200)]
    corpus.write_text(root / "text", documents, held_out_chars=2500, train_chars=10**6)
    return root / "text"


@pytest.fixture
def root(text, tmp_path):
    (tmp_path / "text").symlink_to(text)
    return tmp_path


def weights(root, name):
    return LOADERS[name].from_pretrained(root / name).state_dict()


@pytest.mark.parametrize("name", LOADERS)
def test_a_trained_model_is_one_that_transformers_loads(root, name):
    facts = training.train(name, root, TINY, command="the command")
    assert facts["valid_losses"][-1][1] < facts["valid_losses"][0][1] - 0.3
    assert facts["valid_perplexity"] < facts["unigram_perplexity"] * 1.5
    assert read_checked_json(root / name / "reference.json") == facts
    assert not (root / f"{name}.checkpoint").exists()

    model, loading = LOADERS[name].from_pretrained(root / name, output_loading_info=True)
    assert not any(loading.values()), "no weight is missing, unexpected or of another shape"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight)
    sentence = tale(3)
    assert tokenizer.unk_token_id not in tokenizer(sentence, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(tokenizer(sentence)["input_ids"], skip_special_tokens=True)
    expected = sentence.lower() if name == "bert" else sentence
    assert "".join(decoded.split()) == "".join(expected.split())


@pytest.mark.parametrize("name", LOADERS)
def test_a_tokenizer_depends_on_the_text_alone(name):
    texts = [tale(seed) for seed in range(50)]
    vocabularies = [kinds.KINDS[name].tokenizer(texts, 350).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert len(vocabularies[0]) > 100


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_can_be_repeated_and_an_interrupted_one_continued(root, name, monkeypatch):
    recipe = dataclasses.replace(TINY, steps=12)
    training.train(name, root, recipe)
    expected = weights(root, name)

    batch_at = training.batch_at

    def interrupted(step, *args):
        if step == 7:
            raise KeyboardInterrupt
        return batch_at(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(name, root, recipe)
    steps = []
    monkeypatch.setattr(training, "batch_at", lambda step, *a: steps.append(step) or batch_at(step, *a))
    training.train(name, root, recipe)
    assert steps == list(range(7, 12))
    continued = weights(root, name)
    assert all(torch.equal(continued[each], expected[each]) for each in expected)

    training.train(name, root, dataclasses.replace(recipe, seed=1))
    other = weights(root, name)
    assert any(not torch.equal(other[each], expected[each]) for each in expected)


def test_a_checkpoint_of_another_recipe_is_not_continued(root):
    kind, tokenizer = kinds.KINDS["gpt"], kinds.gpt_tokenizer(["a b"], 300)
    run = training.Training(kind, TINY, tokenizer, "cpu")
    run.save(root / "checkpoint", {"recipe": 1})
    run.progress = {"step": 5}
    run.resume(root / "checkpoint", {"recipe": 2})
    assert run.progress == {"step": 5}
    run.resume(root / "checkpoint", {"recipe": 1})
    assert run.progress["step"] == 0
    whole, draw = (root / "checkpoint").read_bytes(), random.Random(0)
    for at in draw.sample(range(len(whole)), 20):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        (root / "checkpoint").write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint is damaged, or of an earlier version"):
            run.resume(root / "checkpoint", {"recipe": 1})


def test_a_damaged_text_is_not_learned_from(root):
    for name, change in (("train.txt", ("a", "b")), ("text.json", ('"texts": ', '"texts": 1'))):
        path = root / "text" / name
        whole = path.read_text()
        path.write_text(whole.replace(*change, 1))
        with pytest.raises(ValueError, match=f"{name} is damaged or edited"):
            training.train("gpt", root, TINY)
        path.write_text(whole)


def test_masks_spare_special_tokens_and_hit_the_share_that_is_meant():
    tokenizer = kinds.bert_tokenizer([tale(1)], 100)
    seen = {}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.any = torch.nn.Parameter(torch.zeros(1))
            self.cls = lambda hidden: torch.zeros(len(hidden), len(tokenizer))

        def bert(self, ids):
            seen["ids"] = ids
            return type("Output", (), {"last_hidden_state": ids[..., None].float()})

    blocks = torch.randint(5, len(tokenizer), (400, 128))
    blocks[:, 0] = tokenizer.cls_token_id
    for model, share in (
        (Model(), kinds.MASKED_IN_TRAINING),
        (Model().eval(), kinds.MASKED),
    ):
        losses, ids = kinds.bert_loss(model, blocks, tokenizer, torch.Generator().manual_seed(0))
        assert len(losses) == len(ids) == pytest.approx(share * 400 * 127, rel=0.05)
        assert torch.equal(seen["ids"][:, 0], blocks[:, 0])
        assert (seen["ids"] == tokenizer.mask_token_id).sum() == pytest.approx(0.8 * len(ids), rel=0.05)
        changed = (seen["ids"] != blocks).sum()
        assert changed == pytest.approx(0.9 * len(ids), rel=0.05)


def test_the_causal_loss_sees_no_token_to_the_right():
    tokenizer = kinds.gpt_tokenizer([tale(1)], 300)
    model = kinds.gpt_model(TINY, tokenizer).eval()
    blocks = torch.randint(len(tokenizer), (2, kinds.LENGTH))
    changed = blocks.clone()
    changed[:, 60:] = 5
    before, after = (
        kinds.gpt_loss(model, each, tokenizer, torch.Generator())[0].detach().view(2, -1)
        for each in (blocks, changed)
    )
    torch.testing.assert_close(before[:, :59], after[:, :59])
    assert not torch.allclose(before[:, 59:], after[:, 59:])


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [training.rate_at(step, TINY) for step in range(TINY.steps)]
    assert max(rates) == 1 == rates[1]
    assert rates[0] == 0.5
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_every_block_is_seen_once_an_epoch():
    blocks = torch.arange(10)[:, None]
    recipe = kinds.Recipe(steps=5, batch=4)
    seen = torch.cat([training.batch_at(step, blocks, recipe) for step in range(5)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_the_command_trains_what_is_not_there(root, capsys, monkeypatch):
    (root / "reference").mkdir()
    (root / "text").rename(root / "reference" / "text")
    monkeypatch.setattr(reference_models, "Recipe", lambda steps, **_: dataclasses.replace(TINY, steps=steps))
    arguments = ["--models", "gpt", "--steps", "2", "--cache", str(root)]
    reference_models.main(arguments)
    assert "gpt: validation perplexity" in capsys.readouterr().out
    written = (root / "reference" / "gpt" / "reference.json").read_text()
    assert json.loads(written)["command"] == " ".join(["python -m benchmarks reference_models", *arguments])
    reference_models.main(arguments)
    assert "is in" in capsys.readouterr().out
    assert (root / "reference" / "gpt" / "reference.json").read_text() == written
    weights = root / "reference" / "gpt" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"gpt is damaged: model.safetensors was changed .* --overwrite"):
        reference_models.main(arguments)
    reference_models.main([*arguments, "--overwrite"])
    assert (root / "reference" / "gpt" / "reference.json").read_text() != written


def test_an_ngrammer_is_trained_beside_the_model_without(root, capsys, monkeypatch):
    pytest.importorskip("faiss")
    (root / "reference").mkdir()
    (root / "text").rename(root / "reference" / "text")
    monkeypatch.setattr(reference_models, "Recipe", lambda steps, **_: dataclasses.replace(TINY, steps=steps))
    reference_models.main(["--ngrammer", "--steps", "3", "--cache", str(root)])
    assert "gpt: validation perplexity" in capsys.readouterr().out
    place = root / "reference" / "gpt-ngrammer-concat"
    assert read_checked_json(place / "reference.json")["recipe"]["ngrammer"] == "concat"
    model, loading = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(loading.values())
    assert model.get_input_embeddings().ngrammer.combine == "concat"
    with pytest.raises(SystemExit):
        reference_models.main(["--ngrammer", "--models", "bert", "--cache", str(root)])
