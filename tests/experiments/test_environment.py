"""The record of the environment, and the part of it that rows of a study keep."""

from __future__ import annotations

import platform

import torch

import embkern
from embkern.experiments import environment as module
from embkern.experiments.environment import environment, environment_in_words, version_of
from embkern.ops.library import cpu_capability, load_native


def test_the_record_names_versions_processor_and_threads():
    record = environment()
    assert record["embkern"] == embkern.__version__
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["cpu"]
    assert set(record["cpu_flags"]) <= set(module.CPU_FLAGS)
    assert record["native"] == (None if load_native() else cpu_capability())
    assert (record["cuda"] is None) == (not torch.cuda.is_available())


def test_rows_of_a_study_keep_text_only():
    kept = environment_in_words()
    assert kept.keys() == {"embkern", "torch", "transformers", "python", "cpu"}
    assert all(isinstance(each, str) for each in kept.values())
    assert kept["cpu"].startswith(f"{platform.machine()} ")
    assert kept["cpu"].endswith("thread(s)")


def test_a_package_that_is_not_installed_has_no_version():
    assert version_of("torch") == torch.__version__
    assert version_of("a-package-that-nobody-wrote") is None


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "embkern" / "experiments" / "environment.py"))
    assert environment()["commit"] is None
