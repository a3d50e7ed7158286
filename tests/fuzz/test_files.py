"""Damaged files of every format: each is read correctly or refused by name, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embkern.experiments.engine import read_result
from embkern.io.checked_json import to_checked_json
from embkern.io.mapped_table import DTYPES, TableFile
from embkern.io.tensor_format import TensorFormat, _header_checksum, checksum
from embkern.methods.autoencoder import autoencoder
from embkern.methods.autoencoder.checkpoint import FORMAT as CHECKPOINT
from embkern.methods.autoencoder.checkpoint import read_checkpoint
from embkern.methods.autoencoder.weights import Weights
from embkern.methods.calibration import FORMAT as CALIBRATION
from embkern.methods.calibration import Calibration, CalibrationFacts, CalibrationRun
from embkern.models.calibrate.sums import FORMAT as SUMS
from embkern.models.calibrate.sums import Checkpoint, Sums
from embkern.models.calibrate.sums import read_checkpoint as read_sums
from embkern.ops.packed_codes import packed_levels
from embkern.ops.packed_format import Tier
from embkern.study.plans import Plan
from embkern.study.rows import Row
from embkern.tables import ROW_TABLES, RowTable, packed
from embkern.tables import factors as factors_module
from embkern.tables.factors import Factors
from embkern.tables.packed import PackedTable, pack
from embkern.text import counts
from embkern.text.counts import TokenCounts
from tests.example_tables import packed_of
from tests.fuzz import Case, fuzz
from tests.fuzz.damage import (
    HOSTILE,
    HOSTILE_PLACES,
    bounded,
    byte_damage,
    damaged,
    damaged_json,
    header_of,
    hostile_place,
    json_damage,
    json_text,
    place,
    read,
    rechecked,
    safetensors_bytes,
    with_header,
)
from tests.fuzz.tensors import same_bits, spoiled, spoiling
from tests.row_tables import NAMES, row_table

V, H, R = 40, 33, 5
EPOCHS = 2


class Kind(NamedTuple):
    """A file format: how to write its examples, read a file, and check the result."""

    format: TensorFormat
    examples: Callable[[], list[Path]]
    load: Callable[[Path], Any]
    check: Callable[[Any], None]
    tensors: Callable[[Any], dict[str, Tensor]]


def _packed_examples() -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator)
    codes = {0: torch.randint(256, (3, 32), generator=generator).to(torch.uint8)}
    tables = [
        packed_of(weight),
        packed_of(weight, torch.float32, offset=False),
        pack(
            torch.zeros(3).long(), codes, [Tier(False, (8,))], packed_levels(), torch.ones(3), None, None, 31
        ),
    ]
    return _saved("packed", tables)


def _factor_examples() -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    codes, basis = torch.randn(V, R, generator=generator), torch.randn(R, H, generator=generator)
    return _saved(
        "factors",
        [Factors(codes, basis), Factors(codes.bfloat16(), basis.bfloat16(), basis[0].bfloat16(), "elu")],
    )


def _count_examples() -> list[Path]:
    return _saved("counts", [TokenCounts(torch.arange(V) * 7, 11, "sha256:" + "0" * 32, V - 1)])


def _calibration_examples() -> list[Path]:
    runs = (
        CalibrationRun(source="text", texts="sha256:0", tokens=11, length=4, seed=0),
        CalibrationRun(source="samples", texts="sha256:1", tokens=5, length=4, seed=7, pooling="mean"),
    )
    known = dict(architecture="GPT2LMHeadModel", kind="causal", weights="sha256:2")
    moment = (_table().t() @ _table()).double()
    inputs = torch.arange(V).double()
    return _saved(
        "calibration",
        [
            Calibration(
                inputs, moment, 16, inputs / 2, moment, CalibrationFacts(**known, tokenizer="", runs=runs)
            ),
            Calibration(
                inputs, moment, 3, None, None, CalibrationFacts(**known, tokenizer=None, runs=runs[:1])
            ),
        ],
    )


def _check_calibration(calibration: Calibration) -> None:
    assert calibration.inputs.sum() > 0
    assert (calibration.predictions is None) == (calibration.head_moment is None)
    doubled = [2 * each for each in _calibration_tensors(calibration).values()]
    if calibration.scored < 2**62 and all(bool(torch.isfinite(each).all()) for each in doubled):
        facts = calibration.facts
        runs = tuple(run.model_copy(update={"texts": f"{run.texts} and more"}) for run in facts.runs)
        other = dataclasses.replace(calibration, facts=facts.model_copy(update={"runs": runs}))
        assert (calibration + other).tokens == 2 * calibration.tokens
    calibration.summary().model_dump_json()


def _calibration_tensors(each: Calibration | Sums) -> dict[str, Tensor]:
    names = (*CALIBRATION.required, *CALIBRATION.optional)
    return {name: getattr(each, name) for name in names if getattr(each, name) is not None}


IDENTITY = {"weights": "sha256:2", "runs": [{"tokens": 11}]}


def _sums_examples() -> list[Path]:
    path = place() / "sums-0"
    Checkpoint(path, IDENTITY, seconds=0.0).save_if_due(_some_sums())
    return [path]


def _some_sums() -> Sums:
    return Sums(*(torch.ones(size).double() for size in ((V,), (H, H), (V,), (H, H))), 11, 2)


def _check_sums(sums: Sums) -> None:
    assert min(sums.scored, sums.batches) >= 1
    assert sums.inputs.shape == (V,)


def _saved(name: str, things: list[Any]) -> list[Path]:
    paths = [place() / f"{name}-{index}" for index in range(len(things))]
    for path, thing in zip(paths, things, strict=True):
        thing.save(path)
    return paths


def _check_packed(table: PackedTable) -> None:
    ids = torch.arange(table.num_embeddings)[:: max(1, table.num_embeddings // 1000)]
    rows = table.decode(ids)
    assert rows.shape == (len(ids), table.embedding_dim)
    assert len(table.decode(torch.tensor([table.num_embeddings - 1]))) == 1


def _row_examples(kind: type[RowTable]) -> list[Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tables = [row_table(name) for name in NAMES]
    return _saved(kind.kind, [table for table in tables if isinstance(table, kind)])


def _check_rows(table: RowTable) -> None:
    ids = torch.arange(0, table.num_embeddings, max(1, table.num_embeddings // 1000))
    assert table.decode(ids).shape == (len(ids), table.embedding_dim)
    assert table.row_range(0, 1).shape == (1, table.embedding_dim)


def _check_factors(factors: Factors) -> None:
    assert factors.decode(torch.arange(factors.num_embeddings)).shape[-1] == factors.embedding_dim


def _check_counts(counts: TokenCounts) -> None:
    assert counts.tokens >= int(counts.counts.max()), "the sum of counts overflows"
    assert counts.tokens >= 2**62 or (counts + counts).texts == 2 * counts.texts
    json.dumps([counts.texts, counts.vocabulary_size, counts.fingerprint])


@functools.cache
def _table() -> Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0))


@functools.cache
def _checkpoint_examples_once() -> tuple[Path, ...]:
    path = place() / "checkpoint-0"
    options = dict(epochs=EPOCHS, batch_size=16, progress=False, checkpoint_seconds=0)
    autoencoder(_table(), R, checkpoint=path, **options)
    return (path,)


@functools.cache
def _identity() -> dict[str, Any]:
    header, _ = header_of(_checkpoint_examples_once()[0].read_bytes())
    return json.loads(header["__metadata__"]["identity"])


def _load_checkpoint(path: Path) -> Any:
    weights = Weights(torch.zeros(2 * R * H + R + H), R, H)
    state = read_checkpoint(path, _identity(), 100, weights)
    weights.load(state)
    return state


def _check_checkpoint(state: dict[str, Any]) -> None:
    assert len(state["history"]) == state["epoch"] <= 100
    assert min(state["history"], key=lambda entry: entry["score"])
    assert math.isfinite(state["best_score"]), "no later epoch can be better than a score that is not finite"
    assert 0 < state["step"] < 2**53, "Adam counts steps in floating point"


KINDS: dict[str, Kind] = {
    "packed": Kind(packed.FORMAT, _packed_examples, PackedTable.load, _check_packed, PackedTable.tensors),
    "factors": Kind(factors_module.FORMAT, _factor_examples, Factors.load, _check_factors, Factors.tensors),
    "counts": Kind(
        counts.FORMAT,
        _count_examples,
        TokenCounts.load,
        _check_counts,
        lambda each: {"counts": each.counts},
    ),
    "calibration": Kind(
        CALIBRATION, _calibration_examples, Calibration.load, _check_calibration, _calibration_tensors
    ),
    "sums": Kind(
        SUMS,
        _sums_examples,
        lambda path: read_sums(path, IDENTITY, _some_sums()),
        _check_sums,
        _calibration_tensors,
    ),
    "checkpoint": Kind(
        CHECKPOINT,
        lambda: list(_checkpoint_examples_once()),
        _load_checkpoint,
        _check_checkpoint,
        lambda state: {name: state[name] for name in CHECKPOINT.required},
    ),
}
ROW_KINDS = {each.kind: each for each in ROW_TABLES}
KINDS |= {
    name: Kind(
        each.file_format(), functools.partial(_row_examples, each), each.load, _check_rows, each.tensors
    )
    for name, each in ROW_KINDS.items()
}


@functools.cache
def examples(kind: str) -> list[tuple[bytes, Any]]:
    """Return the bytes of each example with the object that is read from them."""
    return [(path.read_bytes(), KINDS[kind].load(path)) for path in KINDS[kind].examples()]


def bytes_case(random: Random) -> Case:
    return dict(
        kind=random.choice(tuple(KINDS)),
        example=random.randrange(6),
        changes=byte_damage(random),
    )


@fuzz(bytes_case)
def test_damaged_bytes_are_noticed(case):
    """Checksums cover the whole file, so what loads is what was saved."""
    kind, several = KINDS[case["kind"]], examples(case["kind"])
    data, saved = several[case["example"] % len(several)]
    path = place() / "damaged"
    path.write_bytes(damaged(data, case["changes"]))
    with bounded():
        got = read(path, lambda: kind.load(path))
    if got is not None:
        expected, found = kind.tensors(saved), kind.tensors(got)
        assert expected.keys() == found.keys()
        assert all(same_bits(tensor, found[name]) for name, tensor in expected.items())
        kind.check(got)


def rewritten_case(random: Random) -> Case:
    case = bytes_case(random)
    names = (*KINDS[case["kind"]].format.required, *KINDS[case["kind"]].format.optional)
    edits = []
    for _ in range(random.choice((1, 1, 2))):
        edit = random.choice(("tensor", "tensor", "value", "setting", "setting", "key", "drop", "add"))
        edits.append((edit, random.randrange(1 << 20), random.choice(HOSTILE), spoiling(random, names)))
    return {**case, "changes": json_damage(random), "edits": edits, "checked": random.random() < 0.9}


@fuzz(rewritten_case)
def test_files_with_checksums_that_hold_are_valid_or_refused(case):
    kind, several = KINDS[case["kind"]], examples(case["kind"])
    data, saved = several[case["example"] % len(several)]
    first = header_of(data)[0]["__metadata__"]
    metadata = dict(first)
    tensors = dict(kind.tensors(saved))
    for edit, at, text, how in case["edits"]:
        if edit in ("tensor", "value"):
            # The tensor is dropped, added, or changed in dtype, shape or values.
            how = (
                {**how, "kind": "value"} if edit == "value" and tensors.get(how["name"]) is not None else how
            )
            # Files have no layouts and no meta tensors.
            how = {**how, "kind": "dim"} if how["kind"] in ("meta", "layout") else how
            changed = spoiled(tensors.get(how["name"]), how)
            tensors = {**tensors, how["name"]: changed}
            if changed is None:
                del tensors[how["name"]]
        elif edit == "setting" and kind.format.settings:
            name = kind.format.settings[at % len(kind.format.settings)]
            if name in first and name in metadata:
                metadata[name] = damaged_json(json.loads(first[name]), case["changes"])
        elif edit in ("key", "drop"):
            name = sorted(metadata)[at % len(metadata)]
            metadata[name] = json_text(text)
            if edit == "drop":
                del metadata[name]
        elif edit == "add":
            metadata["more"] = json_text(text)
    if case["checked"]:
        metadata.update(checksums_of(kind.format, tensors, metadata))
    path = place() / "rewritten"
    path.write_bytes(safetensors_bytes(tensors, metadata))
    with bounded():
        got = read(path, lambda: kind.load(path))
        if got is not None:
            kind.check(got)


def checksums_of(
    format: TensorFormat, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, str]:
    """Return valid checksums of a file; a setting that cannot be parsed counts as 0."""
    checked = dict(tensors)
    for name in format.checked:
        try:
            checked[name] = torch.tensor(int(json.loads(metadata[name])))
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, RecursionError):
            checked[name] = torch.tensor(0)
    texts = {
        **metadata,
        "checksums": json.dumps({name: checksum(tensor) for name, tensor in checked.items()}),
    }
    header = texts.pop("header", None)
    if header is None:
        return {"checksums": texts["checksums"]}
    return {"checksums": texts["checksums"], "header": _header_checksum(tensors, texts)}


# ---- tables larger than memory -----------------------------------------------------------------------


@functools.cache
def table_examples() -> list[bytes]:
    files = []
    for dtype in DTYPES.values():
        tensors = {"other": torch.arange(3), "table": _table().to(dtype)}
        files.append(safetensors_bytes(tensors, {"format": "pt"}))
    return files


def table_case(random: Random) -> Case:
    return dict(
        example=random.randrange(len(DTYPES)),
        changes=json_damage(random) if random.random() < 0.6 else None,
        bytes=byte_damage(random),
        ids=random.randrange(1 << 30),
    )


@fuzz(table_case)
def test_table_files(case):
    data = table_examples()[case["example"]]
    if case["changes"] is None:
        data = damaged(data, case["bytes"])
    else:
        header, rest = header_of(data)
        data = with_header(damaged_json(header, case["changes"]), rest)
    path = place() / "table"
    path.write_bytes(data)
    with bounded():
        table = read(path, lambda: TableFile(path, "table"), (TypeError,))
        if table is None:
            return
        assert 0 < table.nbytes <= len(data)
        assert table.read().shape == table.shape
        ids = torch.tensor([0, len(table) - 1, case["ids"] % len(table)])
        rows = table.gather(ids)
        assert rows.shape == (3, table.shape[1])
        assert same_bits(rows[0], table.read(0, 1)[0].to(rows.dtype))
        assert sum(map(len, table.blocks(7))) == len(table)


# ---- rows of a study ---------------------------------------------------------------------------------

PLAN = Plan(
    "table", "svd:center=true", 5.0, {"model": "sha256:00", "options": {"center": True}, "seeds": [1, 2]}
)


@functools.cache
def study_row() -> dict[str, Any]:
    row = Row(
        id=PLAN.id, measure=PLAN.measure, method=PLAN.method, ratio=PLAN.ratio, depends=PLAN.depends,
        command="embkern study", result={"rmse": 0.5, "tiers": [1, 2]}, seconds=1.5,
        environment={"embkern": "1", "torch": "2"},
    )  # fmt: skip
    return row.model_dump()


def study_case(random: Random) -> Case:
    changes = json_damage(random) if random.random() < 0.6 else None
    return dict(changes=changes, bytes=byte_damage(random), checked=random.random() < 0.8)


@fuzz(study_case)
def test_rows_of_a_study(case):
    """A damaged row is measured again, so reading it raises nothing."""
    directory = place() / "study"
    directory.mkdir(exist_ok=True)
    path = directory / f"{PLAN.id}.json"
    if case["changes"] is None:
        path.write_bytes(damaged(to_checked_json(study_row()).encode(), case["bytes"]))
    else:
        text = damaged_json(study_row(), case["changes"])
        path.write_bytes((rechecked(text) if case["checked"] else text).encode("utf-8", "surrogatepass"))
    with bounded():
        row = read_result(path, Row, PLAN.depends)
    assert row is None or (row.depends == PLAN.depends and not row.retry)
    if row is not None:
        row.model_dump_json()


# ---- paths that are not regular files ----------------------------------------------------------------


def place_case(random: Random) -> Case:
    return dict(kind=random.choice((*KINDS, "table", "study")), place=random.choice(HOSTILE_PLACES))


@fuzz(place_case)
def test_what_is_no_file_is_refused(case):
    if case["kind"] == "study":
        directory = place() / "hostile-study"
        directory.mkdir(exist_ok=True)
        path = hostile_place(case["place"], directory / f"{PLAN.id}.json")
        with bounded():
            assert read_result(path, Row, PLAN.depends) is None
        return
    path = hostile_place(case["place"], place() / "hostile")
    load = KINDS[case["kind"]].load if case["kind"] in KINDS else lambda path: TableFile(path, "table")
    with bounded():
        assert read(path, lambda: load(path)) is None
