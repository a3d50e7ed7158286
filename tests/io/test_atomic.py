"""Atomic writes: an existing file or directory is unchanged until its replacement is complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embkern.io import atomic
from embkern.io.atomic import replacing, replacing_directory


def write(directory: Path, text: str) -> None:
    (directory / "a").write_text(text)
    (directory / "b").write_text(text)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("there_before", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, there_before):
    path = tmp_path / "f"
    if there_before:
        path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == ({"f": "old"} if there_before else {})
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"f": "new"}


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_directory_is_replaced_whole(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(atomic.sys, "platform", "elsewhere")
    target = tmp_path / "parent" / "d"
    for text in ("first", "second"):
        with replacing_directory(target) as temporary:
            write(temporary, text)
        assert contents(target) == {"a": text, "b": text}
    assert os.listdir(tmp_path / "parent") == ["d"]


def test_an_error_while_writing_leaves_the_old_directory(tmp_path):
    target = tmp_path / "d"
    with replacing_directory(target) as temporary:
        write(temporary, "old")
    with pytest.raises(OSError, match="No space"), replacing_directory(target) as temporary:
        (temporary / "a").write_text("half")
        raise OSError(28, "No space left on device")
    assert contents(target) == {"a": "old", "b": "old"}
    assert os.listdir(tmp_path) == ["d"]


def test_a_kill_while_writing_leaves_the_old_directory(tmp_path):
    target = tmp_path / "d"
    with replacing_directory(target) as temporary:
        write(temporary, "old")
    script = (
        "import sys, time; from embkern.io.atomic import replacing_directory\n"
        "with replacing_directory(sys.argv[1]) as d:\n"
        "    (d / 'a').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert contents(target) == {"a": "old", "b": "old"}


def test_links_stay_links_and_files_are_not_directories(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_directory(tmp_path / "link") as temporary:
        write(temporary, "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"a": "new", "b": "new"}
    (tmp_path / "file").write_text("x")
    (tmp_path / "filelink").symlink_to(tmp_path / "file")
    with replacing(tmp_path / "filelink") as temporary:
        temporary.write_text("y")
    assert (tmp_path / "filelink").is_symlink()
    assert (tmp_path / "file").read_text() == "y"
    with pytest.raises(NotADirectoryError, match="is a file"), replacing_directory(tmp_path / "file"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "filelink", "link", "real"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "f") as temporary:
            temporary.write_text("x")
        with replacing_directory(tmp_path / "d"):
            pass
        with replacing(tmp_path / "s") as temporary:
            save_file({"a": torch.ones(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o640, "safetensors creates its files with 0600"
    (tmp_path / "f").chmod(0o600)
    with replacing(tmp_path / "f") as temporary:
        temporary.write_text("y")
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600, "an existing file keeps its mode"
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_the_umask_is_never_set(tmp_path, monkeypatch):
    """All threads share it: a file that another thread creates meanwhile would have the wrong mode."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set the umask of the whole process"))
    with replacing(tmp_path / "f") as temporary:
        temporary.write_text("x")
    with replacing_directory(tmp_path / "d"):
        pass
