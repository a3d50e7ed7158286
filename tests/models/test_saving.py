"""``embkern.models.saving``: what may be replaced, and that nothing is lost."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("transformers")

import embkern
from embkern.models import saving
from embkern.models.report import read_report
from embkern.models.saving import check_output
from tests.example_tables import quantizing  # noqa: F401 (a fixture)
from tests.saved_models import SVD

pytestmark = pytest.mark.usefixtures("quantizing")


def test_an_existing_directory_is_never_lost(source, tmp_path):
    out = tmp_path / "out"
    embkern.compress(source, **SVD, output=out)
    with pytest.raises(FileExistsError, match="output: .* exists"):
        embkern.compress(source, method="svd", rank=4, output=out)
    embkern.compress(source, method="svd", rank=4, output=out, overwrite=True)
    assert read_report(out).rank == 4
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    (tmp_path / "precious" / "config.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"did not write \(config.json, thesis.tex\); it is not replaced"
    ):
        embkern.compress(source, **SVD, output=tmp_path / "precious", overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write \(notes.txt\)"):
        embkern.compress(source, **SVD, output=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    for output in (source, tmp_path):
        with pytest.raises(ValueError, match="output: .* is, or holds, the model to read"):
            embkern.compress(source, **SVD, output=output, overwrite=True)
    with pytest.raises((FileExistsError, PermissionError), match="output"):
        embkern.compress(source, **SVD, output=source / "config.json", overwrite=True)
    assert {"config.json", "model.safetensors"} <= set(os.listdir(source))


def test_a_manifest_that_cannot_be_read_lists_no_files(tmp_path):
    (tmp_path / "config.json").touch()
    listed = tmp_path / "embkern_files.json"
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for a writer of the pipe"))
    try:
        for content in ("[" * 100_000, "[[]]", "{", None):
            listed.unlink(missing_ok=True)
            os.mkfifo(listed) if content is None else listed.write_text(content)
            signal.alarm(20)
            with pytest.raises(FileExistsError, match=r"did not write \(config.json\)"):
                check_output(tmp_path, overwrite=True)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_full_disk_while_saving_leaves_the_old_model_whole(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    embkern.compress(source, **SVD, output=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        embkern.compress(source, method="svd", rank=4, output=out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]
