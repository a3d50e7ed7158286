"""The files around the package: workflows, hooks, templates, the citation, the change log, the sdist."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from embkern._version import __version__

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.py"))

if not WORKFLOWS:
    pytest.skip("needs the checkout", allow_module_level=True)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "environments.mk"))
    return set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))


def matrix_of(job: dict[str, Any]) -> list[dict[str, str]]:
    """Return the values of the matrix of a job, one dict per machine."""
    matrix = job.get("strategy", {}).get("matrix", {})
    if "include" in matrix:
        return matrix["include"]
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def make_commands(workflow: Path) -> set[str]:
    """Return the targets that a workflow makes, with the values of its matrix."""
    found: set[str] = set()
    for job in load(workflow)["jobs"].values():
        runs = [step["run"] for step in job["steps"] if "run" in step]
        for values, run in itertools.product(matrix_of(job), runs):
            for name, value in values.items():
                run = run.replace(f"${{{{ matrix.{name} }}}}", value)
            for line in re.findall(r"^make (.*)$", run, re.MULTILINE):
                found |= {word for word in line.split() if "=" not in word}
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_makes_targets_that_exist(workflow):
    assert make_commands(workflow) - make_targets() == set()


def test_changes_must_pass_what_contributors_run():
    targets = make_commands(ROOT / ".github" / "workflows" / "ci.yml")
    assert targets >= {"demo", "lint", "docs", "test", "test-slow", "test-interpreter"}
    prerequisites = re.search(
        r"^test-all: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert targets >= set(prerequisites[1].split())


def test_a_release_needs_every_wheel_and_no_secret():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["needs"] == ["sdist", "wheels"]
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_with_the_fewest_permissions_and_a_time_limit(workflow):
    read = load(workflow)
    assert read["permissions"]["contents"] == "read"
    for job in read["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_hooks_are_the_commands_of_make_lint():
    """Both then run the same tools, which ``make`` installs into .venv as constraints.txt pins them."""
    recipe = re.search(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    linted = [re.sub(r"^\t@\$\(BIN\)/| (\.|\$\(CPP\))$", "", line) for line in recipe[1].splitlines()]
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == [f".venv/bin/{command}" for command in linted]
    assert {hook["language"] for hook in hooks} == {"system"}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for command in linted:
        assert re.search(rf"^{command.split()[0]}==", pinned, re.MULTILINE), command


def test_a_hook_sees_every_file_that_make_lint_sees():
    hooks = {hook["id"]: hook for hook in load(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]}
    for folder in ("csrc", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".h", ".cpp", ".inl", ".cu", ".cuh"}:
                assert re.search(hooks["clang-format"]["files"], path.relative_to(ROOT).as_posix()), path
    for name in ("embkern/api.py", "benchmarks/__main__.py", "setup.py"):
        assert re.search(hooks["mypy"]["files"], name), name


def test_the_citation_names_this_version_and_the_paper():
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    assert {"type": "other", "value": "arXiv:2106.08181"} in paper["identifiers"]
    assert all(author["family-names"] for author in paper["authors"])


def test_the_change_log_has_the_form_that_a_release_needs():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    for version in versions[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version), version
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.name
)
def test_an_issue_form_has_what_its_host_asks(form):
    read = load(form)
    assert read["name"]
    assert read["description"]
    identifiers = [field["id"] for field in read["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in read["body"]:
        assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]


def test_the_page_of_examples_includes_every_script():
    """A formatter that takes this line for Python puts spaces into it; then the page shows the line."""
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    included = re.findall(r'^--8<-- "(.*)"$', page, re.MULTILINE)
    assert sorted(included) == [path.relative_to(ROOT).as_posix() for path in SCRIPTS]


@pytest.mark.slow
def test_the_sdist_has_what_make_and_the_tests_need(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    sources = tmp_path / "checkout"
    for name in tracked:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=sources, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"embkern-{__version__}.tar.gz") as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    hosting = re.compile(r"\.(github|ci)/|\.gitignore$|\.pre-commit-config\.yaml$")
    assert {name for name in tracked if not hosting.match(name)} - inside == set()
