"""Helpers of the tests of models: compress, reload, compare, and edit saved configs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from embkern import Recipe
from embkern.models.checkpoint import stored_table
from embkern.models.find_table import find_table
from embkern.models.quantizer import install

UNTIED = {"bert-backbone", "llama-untied", "gpt-neox"}

RECIPES = {
    "factors": {"method": "svd", "rank": 7, "options": {"center": True}},
    "packed": {"method": "quantize", "ratio": 2},
    "scalar, rounded": {"method": "rtn", "ratio": 2},
    "scalar, Lloyd-Max": {"method": "lloyd_max", "ratio": 5, "options": {"bits": 4, "group": 10}},
    "product": {"method": "product_quantization", "ratio": 2, "options": {"iterations": 2}},
    "tensor train": {"method": "tensor_train", "ratio": 2},
    "nonlinear": {"method": "nonlinear_autoencoder", "ratio": 2, "options": {"epochs": 1}},
    "pruned, mean": {"method": "prune", "ratio": 2},
    "pruned, nearest": {"method": "prune", "ratio": 2, "options": {"unknown": "nearest"}},
}


def compressed(model, kind="factors", **recipe):
    recipe = Recipe.parse(**{**RECIPES[kind], **recipe})
    table = find_table(model)
    install(model, table, recipe.factorize(table.weight.detach()), recipe)
    return model


def reload(model, path, **kwargs):
    """Save and load; no key may be missing, unexpected or mismatched."""
    model.save_pretrained(path)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return loaded


def round_as_stored(model):
    """Round the live table, in place, to the dtype in which it is stored, so that a reload is exact."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for name, tensor in stored_table(model).tensors().items():
            getattr(embedding, name).copy_(tensor)
    return model


def held(module) -> dict[str, torch.Tensor]:
    """The tensors of a table that a module holds."""
    return {name: getattr(module, name) for name in module.tensors()}


def assert_shared(*modules) -> None:
    for name, tensor in held(modules[0]).items():
        assert all(getattr(module, name) is tensor for module in modules), name


def assert_same_table(got, expected) -> None:
    assert held(got).keys() == held(expected).keys()
    for name, tensor in held(expected).items():
        assert torch.equal(getattr(got, name), tensor), name


def edit(path: Path, change) -> None:
    """Change a saved config after downgrading it to the first version, which has no checksum."""
    config = json.loads(path.read_text())
    config["quantization_config"].pop("checksum", None)
    config["quantization_config"]["format_version"] = 1
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def shape(name: str, *sizes):
    return lambda config: config["table"]["shapes"].update({name: list(sizes)})


def of_table(**fields):
    return lambda config: config["table"].update(fields)
