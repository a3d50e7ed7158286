"""``NGrammer``: its formula, the hashes, latent ids that follow the rows, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from embkern.methods.product import product_codes
from embkern.nn import NGrammer
from embkern.nn.ngrammer import shifted
from tests.methods.row_tables import needs_faiss

pytestmark = needs_faiss
V, H, HEADS, BITS = 61, 12, 3, 4
K = 2**BITS
EXACT = "donot_use_mm_for_euclid_dist"


def layer_over(table, **options):
    made = NGrammer(len(table), table.shape[1], **{"heads": HEADS, "bits": BITS, "buckets": 37, **options})
    made.initialize(product_codes(table, subspaces=HEADS, bits=BITS, iterations=4))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "ngrams":
                parameter.normal_()
    return made.eval()


def by_hand(layer, table, ids):
    """The formula of the docstring, position by position."""
    out = torch.zeros(len(ids), H)
    d = H // HEADS
    for t, token in enumerate(ids.tolist()):
        for j in range(HEADS):
            before = K if t == 0 else int(layer.latent_ids[ids[t - 1], j])
            bigram = int(layer.latent_ids[token, j]) + K * before
            multiplier, offset, prime = layer.hashes[j].tolist()
            bucket = (multiplier * bigram + offset) % prime % layer.buckets
            found = layer.ngrams[layer.buckets * j + bucket]
            added = F.layer_norm(found, (layer.width,)) * layer.ngram_gain[j] + layer.ngram_shift[j]
            row = table[token, j * d : (j + 1) * d]
            if layer.combine == "add":
                out[t, j * d : (j + 1) * d] = row + added
            else:
                kept = F.layer_norm(row, (d,))[: d - layer.width] * layer.row_gain[j] + layer.row_shift[j]
                out[t, j * d : (j + 1) * d] = torch.cat([kept, added])
    return out


@pytest.mark.parametrize("options", [{}, {"combine": "concat"}, {"combine": "concat", "width": 3}])
def test_the_formula(options):
    table = torch.randn(V, H)
    layer = layer_over(table, **options)
    ids = torch.randint(V, (2, 9))
    got = layer(ids, table[ids])
    assert_close(got, torch.stack([by_hand(layer, table, each) for each in ids]), rtol=1e-4, atol=1e-5)
    assert layer(ids[:, :0], table[ids[:, :0]]).shape == (2, 0, H)
    later = layer(ids[:, 4:].int(), table[ids[:, 4:]], previous=ids[:, 3:-1])
    assert_close(later, got[:, 4:])
    assert layer(ids, table[ids].bfloat16()).dtype == torch.bfloat16


def test_a_position_depends_on_itself_and_on_the_one_before():
    table = torch.randn(V, H)
    layer, ids = layer_over(table), torch.randint(V, (1, 9))
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % V
    differs = (layer.places(ids, shifted(ids)) != layer.places(changed, shifted(changed))).any(-1)[0]
    assert set(differs.nonzero().flatten().tolist()) <= {4, 5}
    assert torch.equal(shifted(ids)[0, 1:], ids[0, :-1])
    assert shifted(ids)[0, 0] == -1


def test_every_head_has_a_hash_of_its_own_that_spreads_the_bigrams():
    table = torch.randn(V, H)
    layer = layer_over(table, buckets=64)
    multiplier, _, prime = layer.hashes.unbind(1)
    assert len(set(prime.tolist())) == HEADS
    assert bool((prime > K * (K + 1)).all())
    assert bool((multiplier > 0).all())
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    places = layer.places(pairs[:, 1], pairs[:, 0])
    for head in range(HEADS):
        assert int(places[:, head].min()) >= 64 * head
        assert int(places[:, head].max()) < 64 * (head + 1)
        assert len(places[:, head].unique()) > 32  # at least half of the buckets are in use


def test_a_layer_that_adds_changes_nothing_at_first_and_then_learns():
    table = torch.randn(V, H)
    layer = NGrammer(V, H, heads=HEADS, bits=BITS, buckets=37)
    layer.initialize(product_codes(table, subspaces=HEADS, bits=BITS, iterations=2))
    ids = torch.randint(V, (2, 9))
    assert torch.equal(layer(ids, table[ids]), table[ids])
    target = torch.randn(2, 9, H)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(ids, table[ids]) - table[ids] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())


def test_latent_ids_follow_the_rows_in_training_mode_alone():
    table = torch.randn(V, H)
    layer = layer_over(table, decay=0.5)
    before, words = layer.latent_ids.clone(), layer.codewords.clone()
    ids, moved = torch.tensor([[3, 5, 3, 8]]), table.flip(0)
    layer(ids, moved[ids])
    assert torch.equal(layer.latent_ids, before)
    assert torch.equal(layer.codewords, words)
    layer.train()
    layer(ids, moved[ids])
    d = H // HEADS
    for token in (3, 5, 8):
        for j in range(HEADS):
            distances = (words[:, j * d : (j + 1) * d] - moved[token, j * d : (j + 1) * d]).norm(dim=1)
            chosen = distances[int(layer.latent_ids[token, j])]
            assert float(chosen) <= float(distances.min()) + 1e-5
    others = [each for each in range(V) if each not in (3, 5, 8)]
    assert torch.equal(layer.latent_ids[others], before[others])
    assert_close(layer.mass.sum(1), torch.ones(HEADS))
    for _ in range(40):  # the codewords of tokens that are read again and again are their rows' means
        layer(ids, moved[ids])
    copy = torch.cat(
        [layer.codewords[layer.latent_ids[5, j].long(), j * d : (j + 1) * d] for j in range(HEADS)]
    )
    alone = all(layer.latent_ids[5, j] not in layer.latent_ids[[3, 8], j] for j in range(HEADS))
    assert not alone or bool(torch.allclose(copy, moved[5], atol=1e-3))

    fixed = layer_over(table, decay=None).train()
    fixed(ids, moved[ids])
    assert torch.equal(fixed.latent_ids, before)
    assert "codewords" not in fixed.state_dict()


def test_what_is_refused():
    for options, message in [
        ({"heads": 5}, "heads: expected a divisor of H = 12, got 5"),
        ({"bits": 9}, "bits: expected an integer, 1 to 8, got 9"),
        ({"width": 2}, "width: expected H / heads = 4 with combine='add', got 2"),
        ({"combine": "concat", "width": 4}, "width: expected an integer, 1 to 3, got 4"),
        ({"combine": "sum"}, "combine: expected add or concat, got 'sum'"),
        ({"decay": 1}, "decay: expected a number between 0 and 1, or None, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            NGrammer(V, H, **{"heads": HEADS, "bits": BITS, "buckets": 37, **options})
    table = torch.randn(V, H)
    layer = layer_over(table)
    with pytest.raises(ValueError, match=r"codes: expected \(V, H, subspaces, bits\) of"):
        layer.initialize(product_codes(table, subspaces=4, bits=BITS, iterations=1))
    with pytest.raises(ValueError, match=r"rows: expected shape \(2, 3, 12\)"):
        layer(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 11))
    with pytest.raises(IndexError):
        layer(torch.tensor([[V]]), torch.zeros(1, 1, H))


def test_codes_of_a_given_number_are_nearest_codewords():
    table = torch.randn(V, H)
    codes = product_codes(table, subspaces=HEADS, bits=BITS, iterations=4)
    assert (codes.subspaces, codes.bits, codes.scales, codes.rotation) == (HEADS, BITS, None, None)
    decoded, d = codes.to_dense(), H // HEADS
    for j in range(HEADS):
        part = slice(j * d, (j + 1) * d)
        nearest = torch.cdist(table[:, part], codes.codebooks[:, part], compute_mode=EXACT).amin(1)
        assert_close((table - decoded)[:, part].norm(dim=1), nearest, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="subspaces: expected an integer, 1 to 12, got 13"):
        product_codes(table, subspaces=13)
