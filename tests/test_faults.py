"""Faults around files: kills, full and read-only disks, two writers. Existing files stay intact."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embkern.cli import main as cli
from embkern.experiments.engine import write_result
from embkern.io.atomic import check_writable, check_writable_directory, replacing, replacing_directory
from embkern.io.errors import disk_error
from embkern.methods import autoencoder
from embkern.study.rows import Row
from embkern.tables.factors import Factors
from embkern.text.counts import TokenCounts
from tests.example_tables import packed_of

resource = pytest.importorskip("resource")

# ---- full disks: exceeding the limit of a file's size fails in the same calls as a full disk


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files in the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_rows(path: Path, size: int) -> None:
    row = Row(
        id=path.stem, measure="m", method="svd", ratio=2.0, depends={}, command="", seconds=1.0,
        reason="x" * size, environment={},
    )  # fmt: skip
    write_result(path, row)


WRITERS = {
    "factors": lambda path, size: Factors(torch.rand(size, 1), torch.rand(1, 3)).save(path),
    "packed": lambda path, size: packed_of(torch.rand(min(size, 3000), 8)).save(path),
    "counts": lambda path, size: TokenCounts(torch.ones(size).long(), 1, "sha256:ab", 3).save(path),
    "rows": save_rows,
}


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_existing_files_intact(tmp_path, writer, there_before):
    path = tmp_path / "out.json"
    if there_before:
        WRITERS[writer](path, 10)
    before = contents(tmp_path)
    with largest_file(8192), pytest.raises(OSError, match=r"could not be written \(.*out.json") as caught:
        WRITERS[writer](path, 10**5)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint", "log"])
def test_a_full_disk_under_a_checkpoint_or_a_log(tmp_path, name):
    table, path = torch.randn(64, 40), tmp_path / name
    options = dict(batch_size=64, progress=False, checkpoint_seconds=0)
    autoencoder(table, 2, epochs=3, **options, **{name: path})
    before = contents(tmp_path)
    with largest_file(len(before[name]) + 200), pytest.raises(OSError, match=f"could not be.*{path}"):
        autoencoder(table, 2, epochs=40, **options, **{name: path})
    assert list(contents(tmp_path)) == [name], "no temporary file is left"
    resumed = autoencoder(table, 2, epochs=40, **options, **{name: path})
    whole = autoencoder(table, 2, epochs=40, batch_size=64, progress=False)
    assert torch.equal(resumed.codes, whole.codes)


def test_a_full_disk_is_one_line_of_the_command_line(tmp_path, monkeypatch, capsys):
    save_file({"t": torch.randn(5000, 8)}, tmp_path / "table")
    (tmp_path / "out").write_bytes(b"old")
    options = ["--rank", "2", "--epochs", "1", "--batch-size", "5000", "--overwrite"]
    arguments = ["train", str(tmp_path / "table"), "--tensor", "t", "-o", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["embkern", *arguments])
    with largest_file(16384), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embkern: ")]
    assert line == f"embkern: [Errno 27] could not be written (File too large): '{tmp_path / 'out'}'"
    assert sorted(contents(tmp_path)) == ["out", "table"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_full_device_is_named(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def full(path: Path, mode: int) -> Path:
        (link := path.parent / ".full.tmp").symlink_to("/dev/full")
        return link

    monkeypatch.setattr("embkern.io.atomic._new_file", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): .*out.json"):
        save_rows(tmp_path / "out.json", 10**5)
    assert not os.listdir(tmp_path)


def test_a_full_disk_under_a_directory(tmp_path):
    with replacing_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    with (
        largest_file(1000),
        pytest.raises(OSError, match=rf"could not be written \(File too large\): '{tmp_path / 'd'}'"),
        replacing_directory(tmp_path / "d") as folder,
    ):
        (folder / "a").write_text("new" * 1000)
    assert contents(tmp_path) == {"d/a": b"old"}


def test_a_full_disk_under_a_model(tmp_path):
    pytest.importorskip("transformers")
    api, saving = map(importlib.import_module, ("embkern.api", "embkern.models.saving"))
    models = importlib.import_module("tests.example_models")
    model = models.build("bert")
    report = api.compress(model, method="svd", rank=5, output=tmp_path / "m")
    before = contents(tmp_path)
    message = f"could not be written .*'{tmp_path / 'm'}'"
    with largest_file(20000), pytest.raises(OSError, match=message):
        saving.save(report.model, tmp_path / "m")
    assert contents(tmp_path) == before
    (tokenizer := models.word_tokenizer()).add_tokens([f"word{number}" for number in range(5000)])
    with largest_file(max(map(len, before.values()))), pytest.raises(OSError, match=message):
        saving.save(report.model, tmp_path / "m", tokenizer=tokenizer)
    assert contents(tmp_path) == before


def test_errors_of_other_files_are_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere") as caught, replacing(tmp_path / "f"):
        (tmp_path / "elsewhere").read_text()
    assert caught.value.filename == str(tmp_path / "elsewhere")
    elsewhere = OSError(errno.ENOSPC, "full", str(tmp_path / "log"))
    with pytest.raises(OSError, match="full.*log"), replacing(tmp_path / "f"):
        raise elsewhere
    assert not os.listdir(tmp_path)


def test_messages_of_safetensors_become_an_errno():
    error = disk_error(Exception("I/O error: No space left on device (os error 28)"))
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert disk_error(Exception("header too large")) is None


# ---- paths that cannot be written


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new", "output")
    check_writable(tmp_path / "file", "output")
    check_writable_directory(tmp_path / "a" / "b", "output")
    check_writable_directory(tmp_path, "output")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(NotADirectoryError, match="output: expected a directory, got .*: .*file is a file"):
        check_writable_directory(tmp_path / "file" / "a", "output")
    with pytest.raises(OSError, match=r"output: cannot be written \(File name too long\)"):
        check_writable(tmp_path / ("f" * 250), "output")
    if not Path("/proc/self").is_dir():
        pytest.skip("no directory that root cannot write either")
    with pytest.raises(OSError, match=r"output: cannot be written \(.*'/proc/self/f'"):
        check_writable("/proc/self/f", "output")
    with pytest.raises(OSError, match=r"output: cannot be written \(.*'/proc/self/f/g'"):
        check_writable_directory("/proc/self/f/g", "output")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not apply to root")
def test_a_read_only_directory_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="output: cannot be written"):
            check_writable(tmp_path / "f", "output")
        with pytest.raises(PermissionError, match="output: cannot be written"):
            check_writable_directory(tmp_path / "d", "output")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_is_synchronised_before_it_is_renamed(tmp_path, monkeypatch):
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("directory" if path.is_dir() else f"file of {path.stat().st_size}")
        sync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", lambda path, to: done.append("rename") or rename(path, to))
    with replacing(tmp_path / "f") as temporary:
        temporary.write_text("12345")
    assert done == ["file of 5", "rename", "directory"]


# ---- kills, and two writers: the processes are forked, so that torch is imported once

FORKS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from embkern.tables.factors import Factors
from embkern.io.atomic import replacing_directory
from embkern.methods import autoencoder

folder, draw = Path(sys.argv[1]), random.Random(0)
path, checkpoint, directory = folder / "factors", folder / "checkpoint", folder / "directory"
tables = [Factors(torch.full((3000, 4), float(i)), torch.full((4, 8), float(i))) for i in (1, 2)]

def forked(function, *arguments):
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

def save(times=10**9, which=(0, 1)):
    for number in range(times):
        tables[which[number % len(which)]].save(path)

def save_directory(times=10**9, which=(0, 1)):
    for number in range(times):
        value = str(which[number % len(which)])
        with replacing_directory(directory) as temporary:
            for name in "abc":
                (temporary / name).write_text(value * 1000)

def check():
    loaded = Factors.load(path)
    assert any(torch.equal(loaded.codes * loaded.basis[0, 0], each.codes * each.codes) for each in tables)

def check_directory():
    found = {each.name: each.read_text() for each in directory.iterdir()}
    assert found.keys() == set("abc") and len(set(found.values())) == 1, found

def train(epochs):
    return autoencoder(torch.arange(240.0).view(60, 4).sin(), 2, epochs=epochs, batch_size=8, progress=False,
                       checkpoint=checkpoint, checkpoint_seconds=0)

def ended(pid):
    assert os.waitpid(pid, 0)[1] == 0
"""
KILLED = """
tables[0].save(path)
save_directory(1)
for work, whole in ((save, check), (save_directory, check_directory)):
    for _ in range(25):
        pid = forked(work)
        time.sleep(0.03 * draw.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        whole()
for _ in range(12):
    pid = forked(train, 10**6)
    time.sleep(0.1 * draw.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
from safetensors import safe_open
with safe_open(checkpoint, "pt") as file:
    epochs = int(file.metadata()["epoch"]) + 2
assert epochs > 4, epochs
resumed = train(epochs)
checkpoint.unlink()
assert torch.equal(resumed.codes, train(epochs).codes)
print("whole")
"""
TWO_WRITERS = """
for work, whole in ((save, check), (save_directory, check_directory)):
    work(1)
    pids = [forked(work, 60, (which,)) for which in (0, 1)]
    while any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids):
        if whole is check:
            whole()  # a single file is replaced atomically; of a directory a reader may see both versions
    for pid in pids:
        ended(pid)
    whole()
pids = [forked(train, 40) for _ in range(2)]
for pid in pids:
    ended(pid)
resumed = train(42)
checkpoint.unlink()
assert torch.equal(resumed.codes, train(42).codes)
assert sorted(os.listdir(folder)) == ["checkpoint", "directory", "factors"], "no temporary file is left"
print("whole")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported")
@pytest.mark.parametrize("script", [KILLED, TWO_WRITERS], ids=["killed", "two writers"])
def test_files_are_whole_at_any_moment(tmp_path, script):
    done = subprocess.run(
        [sys.executable, "-c", FORKS + script, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
