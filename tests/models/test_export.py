"""Compressed models in torch.export, torch.jit.trace and torch.compile: one node per lookup and per head."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers")

from embkern.ops import DECOMPOSITIONS
from tests.conftest import compile_counting
from tests.example_models import H, V, build
from tests.models.compressing import compressed

pytestmark = pytest.mark.usefixtures("quantizing")
# One architecture per way of using the table: a tied head with and without a bias, none.
NAMES = ["bert", "llama-tied", "bert-backbone"]


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Inference(nn.Module):
    """A model as a function to one tensor, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.config.use_cache = False
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def exported(model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    """Export with free batch and length, for parameters that are trainable, in grad mode."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    return torch.export.export(model, (), inputs(2, 9), dynamic_shapes=shapes, strict=strict)


def own_nodes(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("embkern.")]


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"]
)
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_computes_the_same_for_other_shapes(name, kind, strict):
    model = Inference(compressed(build(name), kind)).eval()
    program = exported(model, strict)
    heads = int(kind == "packed" and name != "bert-backbone")  # factors' heads are plain products
    assert len(own_nodes(program.graph)) == 1 + heads, own_nodes(program.graph)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not own_nodes(plain.graph)
    for shape in ((3, 5), (1, 12), (2, 9)):
        example = inputs(*shape)
        expected = model(**example)
        assert_close(program.module()(**example), expected)
        assert_close(plain.module()(**example), expected, rtol=1e-4, atol=1e-5)


def test_a_program_is_saved_and_loaded(tmp_path, kind):
    model = Inference(compressed(build("llama-tied"), kind)).eval()
    torch.export.save(exported(model, strict=False), tmp_path / "model.pt2")
    example = inputs(3, 7)
    assert_close(torch.export.load(tmp_path / "model.pt2").module()(**example), model(**example))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_aotinductor_packages_lookup_and_head(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("CI", "1")  # The compiler is stricter there.
    model = compressed(build("llama-tied"), kind)
    both = nn.Sequential(model.get_input_embeddings(), nn.Tanh(), model.get_output_embeddings()).eval()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    with torch.no_grad():
        program = torch.export.export(both, (torch.randint(0, V, (2, 9)),), dynamic_shapes=(sizes,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for shape in ((2, 9), (3, 4)):
            ids = torch.randint(0, V, shape)
            assert_close(packaged(ids), both(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("served_by", ["native", "torch"])
def test_lookup_and_head_are_traced(kind, served_by, request, tmp_path):
    if served_by == "native":
        request.getfixturevalue("native")
    model = compressed(build("llama-tied"), kind)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.backend = head.backend = served_by
    both = nn.Sequential(embedding, nn.Tanh(), head)
    traced = torch.jit.trace(both, torch.randint(0, V, (2, 5)))
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for shape in ((2, 5), (3, 4), (1, 1)):
        ids = torch.randint(0, V, shape)
        assert_close(loaded(ids), both(ids))


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_a_model_compiles_to_one_graph_for_every_number_of_ids(name, kind):
    model = Inference(compressed(build(name), kind)).eval()
    compiled, graphs = compile_counting(model)
    with torch.no_grad():
        for shape in ((2, 3), (3, 7), (5, 40), (17, 31)):
            example = inputs(*shape)
            for each in example.values():  # torch specialises on a size that it does not know to be free
                torch._dynamo.mark_dynamic(each, (0, 1))
            assert_close(compiled(**example), model(**example), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert len([target for target in own_nodes(graphs[0].graph) if "gather" in target]) == 1


@pytest.mark.parametrize("served_by", ["native", "torch"])
def test_the_graph_of_a_head_does_not_grow_with_its_table(monkeypatch, served_by, request):
    if served_by == "native":
        request.getfixturevalue("native")
    monkeypatch.setattr("embkern.ops.reference.packed_logits.PIECE_ROWS", 32)
    head = compressed(build("llama-tied"), "packed").get_output_embeddings()
    head.backend = served_by
    for function in (head, lambda hidden: head.loss(hidden, torch.arange(5))):
        compiled, graphs = compile_counting(function)
        hidden = torch.randn(5, H, requires_grad=True)
        got, expected = compiled(hidden), function(hidden)
        assert_close(got, expected)
        assert_close(*(torch.autograd.grad(each.sum(), hidden) for each in (got, expected)))
        assert len(graphs) == 2
        assert all(len(own_nodes(graph.graph)) <= 1 for graph in graphs)
        assert sum(len(own_nodes(graph.graph)) for graph in graphs) >= 1
        assert len(graphs[0].graph.nodes) < 40
