"""Damaged models, JSON and YAML files: each is read correctly or refused by name."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

T = pytest.importorskip("transformers")

from embkern import EmbkernConfig, Recipe
from embkern.evaluate.cells import RESULT_NAME, Cell
from embkern.experiments.engine import read_result
from embkern.models import loading, saving
from embkern.models.config import _checksum_of
from embkern.models.find_table import find_table
from embkern.models.quantizer import install
from embkern.models.report import REPORT_NAME, read_report
from embkern.nn.base import CompressedEmbedding
from tests.example_models import tiny_bert
from tests.example_tables import packed_of
from tests.fuzz import Case, fuzz
from tests.fuzz.damage import (
    HOSTILE_PLACES,
    Raw,
    bounded,
    byte_damage,
    damaged,
    damaged_json,
    header_of,
    hostile_place,
    json_damage,
    place,
    read,
    rechecked,
    with_header,
)

KINDS = ("factors", "packed")
V, H = 50, 32


@functools.cache
def saved(kind: str) -> Path:
    """Save a small compressed model and return its directory."""
    torch.manual_seed(0)
    model = tiny_bert(vocab_size=V, num_hidden_layers=1)
    table = find_table(model)
    recipe = Recipe.parse(method="svd", rank=5)
    weight = table.weight.detach()
    install(model, table, recipe.factorize(weight) if kind == "factors" else packed_of(weight), recipe)
    model.save_pretrained(place() / kind)
    return place() / kind


@functools.cache
def config_of(kind: str) -> dict[str, Any]:
    return json.loads((saved(kind) / "config.json").read_text())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Silence transformers, which warns about every unusual config."""
    T.utils.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# ---- the description of a table in config.json -------------------------------------------------------


def config_case(random: Random) -> Case:
    return dict(kind=random.choice(KINDS), changes=json_damage(random), checked=random.random() < 0.9)


def with_checksum(described: Any) -> Any:
    """Return a description with a valid checksum."""
    if isinstance(described, dict) and "checksum" in described:
        names = ("method", "ratio", "rank", "lm_head", "options", "table")
        described["checksum"] = _checksum_of({name: described.get(name) for name in names})
    return described


@fuzz(config_case)
def test_descriptions_of_a_table(case):
    text = damaged_json(config_of(case["kind"])["quantization_config"], case["changes"])
    try:
        described = json.loads(text)
        described = with_checksum(described) if case["checked"] else described
    except (ValueError, RecursionError):
        return  # invalid JSON; the tests of whole models cover it
    if not isinstance(described, dict):
        return
    with bounded():
        config = read(place(), lambda: EmbkernConfig(**described), (TypeError,), named="")
        if config is not None and config.table is not None:
            skeleton = config.table.skeleton(torch.float32)
            assert skeleton.num_embeddings > 0
            assert skeleton.embedding_dim > 0
            json.dumps(config.to_dict())


# ---- whole models ------------------------------------------------------------------------------------


def model_case(random: Random) -> Case:
    return dict(
        kind=random.choice(KINDS),
        file=random.choice(("config.json", "config.json", "model.safetensors")),
        how=random.choice(("json", "json", "bytes", "place")),
        changes=json_damage(random),
        bytes=byte_damage(random),
        place=random.choice(HOSTILE_PLACES[:-1]),
        described=random.random() < 0.7,
    )


@fuzz(model_case)
def test_models_with_a_damaged_file(case):
    source, directory = saved(case["kind"]), place() / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    path = directory / case["file"]
    data = path.read_bytes()
    if case["how"] == "place":
        hostile_place(case["place"], path)
    elif case["how"] == "bytes":
        path.write_bytes(damaged(data, case["bytes"]))
    elif case["file"] == "config.json":
        config = json.loads(data)
        if case["described"]:
            text = damaged_json(config["quantization_config"], case["changes"])
            with contextlib.suppress(ValueError, RecursionError):  # invalid JSON stays unchanged
                text = json.dumps(with_checksum(json.loads(text)))
            config["quantization_config"] = Raw("@")
            text = json.dumps(config).replace('"@"', text)
        else:
            text = damaged_json(config, case["changes"])
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        header, rest = header_of(data)
        path.write_bytes(with_header(damaged_json(header, case["changes"]), rest))
    # A damaged config may describe a huge model; allocating the model around the table is up to transformers.
    with bounded():
        model = read(directory, lambda: loading.load_model(directory), (FileNotFoundError,))
        if model is None:
            return
        embedding = model.get_input_embeddings()
        if isinstance(embedding, CompressedEmbedding):
            ids = torch.arange(embedding.num_embeddings)
            with torch.no_grad():
                assert embedding(ids).shape == (embedding.num_embeddings, embedding.embedding_dim)


# ---- documents beside a model ------------------------------------------------------------------------


def document_case(random: Random) -> Case:
    return dict(
        kind=random.choice(("manifest", "report", "cell", "recipe")),
        how=random.choice(("json", "json", "bytes", "place")),
        changes=json_damage(random),
        bytes=byte_damage(random),
        place=random.choice(HOSTILE_PLACES[:-1]),
        checked=random.random() < 0.8,
    )


RECIPE = {
    "method": "autoencoder",
    "ratio": 5.0,
    "lm_head": "dense",
    "options": {"epochs": 3, "activation": "elu"},
}
REPORT = {"source": "a", "architecture": "b", "recipe": RECIPE, "num_embeddings": 5, "table": {"rmse": 1.0}}


@fuzz(document_case)
def test_documents(case):
    directory = place() / "documents"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    name, document = {
        "manifest": (saving.MANIFEST_NAME, ["config.json", "model.safetensors"]),
        "report": (REPORT_NAME, REPORT),
        "cell": (RESULT_NAME, REPORT),
        "recipe": ("recipe.yaml", RECIPE),
    }[case["kind"]]
    path = directory / name
    if case["how"] == "place":
        hostile_place(case["place"], path)
    elif case["how"] == "bytes":
        path.write_bytes(damaged(json.dumps(document).encode(), case["bytes"]))
    else:
        text = damaged_json(document, case["changes"])
        path.write_bytes((rechecked(text) if case["checked"] else text).encode("utf-8", "surrogatepass"))
    with bounded():
        if case["kind"] == "manifest":  # an unreadable manifest lists no files, so no file is replaced
            (directory / "config.json").touch()
            foreign = saving._foreign_files(directory)
            assert set(foreign) <= {"config.json"} | {each.name for each in directory.iterdir()}
        elif case["kind"] == "report":
            read(path, lambda: read_report(directory))
        elif case["kind"] == "cell":
            assert read_result(path, Cell, {}) is None  # nothing is raised: the cell runs again
        else:
            recipe = read(path, lambda: Recipe.from_yaml(path), named="recipe")
            assert recipe is None or recipe.model_dump()
