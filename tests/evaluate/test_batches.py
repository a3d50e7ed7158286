"""Batches: groups of windows of similar length, padded on the right."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")

from embkern.evaluate.batches import SORTED_BATCHES, Batch, grouped
from embkern.evaluate.windows import Window
from tests.example_models import build


def window(length: int, scored: int) -> Window:
    ids = np.arange(1, length + 1)
    positions = np.arange(length - scored, length)
    return Window(ids, positions, ids[positions] + 40, length)


def test_windows_are_padded_and_positions_count_in_the_flattened_batch():
    batch = Batch.of([window(3, 2), window(5, 1)], build("bert"))
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [1, 2, 9]
    assert batch.targets.tolist() == [42, 43, 45]
    ids = batch.inputs["input_ids"].flatten()
    assert (ids[batch.positions] + 40).tolist() == batch.targets.tolist()


def test_windows_of_equal_length_need_no_mask():
    assert Batch.of([window(4, 1), window(4, 2)], build("bert")).inputs.keys() == {"input_ids"}


def test_groups_hold_every_scored_window_once_and_are_sorted_within_a_block():
    size = 3
    lengths = [5 + (7 * i) % 11 for i in range(SORTED_BATCHES * size + 4)]
    groups = list(grouped((window(length, i % 2) for i, length in enumerate(lengths)), size))
    scored = [length for i, length in enumerate(lengths) if i % 2]
    found = [len(each.ids) for group in groups for each in group]
    assert found == sorted(scored), "they fit one block"
    assert {len(group) for group in groups[:-1]} == {size}
    longer = [window(length, 1) for length in lengths]
    found = [len(each.ids) for group in grouped(iter(longer), size) for each in group]
    block = SORTED_BATCHES * size
    assert found == sorted(lengths[:block]) + sorted(lengths[block:]), "no later window is waited for"
