"""DD-Select: running sums against one layer, head and query at a time; weights say where attention is cut."""

from __future__ import annotations

import numpy as np
import pytest

from semkv_deploy.methods.dd_select import (
    DomainText,
    LayerAttention,
    Regions,
    candidate_score,
    candidate_scores,
    delimiter_table,
    online_scores,
    segment_online,
)
from semkv_deploy.model.blocks import BlockRule, segment

TOKENS, DIM = 90, 8


def layer(seed: int, softcap: float = 0.0, scale: float = 0.0) -> LayerAttention:
    """Four query heads over two KV heads."""
    random = np.random.default_rng(seed)
    query, key = (random.standard_normal((heads, TOKENS, DIM)).astype(np.float32) for heads in (4, 2))
    return LayerAttention(query, key, scale, softcap)


@pytest.mark.parametrize("regions", [Regions(8, 4, 1.0), Regions(1, 1, 0.0), Regions(20, 16, 2.5)])
def test_running_sums_are_the_slow_statement(regions: Regions):
    layers = [layer(0), layer(1, softcap=2.0), layer(2, scale=0.9)]
    candidates = np.array([19, 33, 40, TOKENS - 1 - regions.future])
    expected = [candidate_score(layers, int(i), regions) for i in candidates]
    np.testing.assert_allclose(candidate_scores(layers, candidates, regions), expected, atol=1e-5)


def cut_text(good: int, bad: int, seed: int = 0) -> DomainText:
    """Segments of 10 tokens; tokens look at their own segment and, behind `bad`, also at the text's beginning."""
    tokens = np.full(TOKENS, 9)
    tokens[9::10] = [good, bad] * 4 + [good]
    query = np.zeros((1, TOKENS, DIM), np.float32)
    key = np.zeros((1, TOKENS, DIM), np.float32)
    key[0, :10, 0] = 8
    random = np.random.default_rng(seed)
    for start in range(10, TOKENS, 10):
        query[0, start : start + 10, 0] = 4 if tokens[start - 1] == bad else -4
    query += 0.01 * random.standard_normal(query.shape).astype(np.float32)
    return DomainText("prose", tokens, np.isin(tokens, [good, bad]), [LayerAttention(query, key, 0.0, 0.0)])


def test_a_delimiter_behind_which_the_far_past_is_needed_weighs_less():
    table = delimiter_table([cut_text(3, 5)], Regions(10, 5, 1.0), 12)
    weights = dict(zip(table.token_ids, table.domains[0].weights, strict=False))
    assert table.token_ids == (3, 5) and weights[3] > 300 and weights[5] < -300
    assert table.domains[0].weights[-1] == 0 and len(table.domains[0].weights) == 3
    assert table.candidates == (8,) and table.tokens == (TOKENS,)


def test_shares_tell_domains_apart_and_weights_are_a_domains_own():
    first, second = cut_text(3, 5), cut_text(7, 3)._replace(domain="code")
    table = delimiter_table([first, second], Regions(10, 5, 1.0), 12)
    prose, code = table.domains
    assert (prose.name, code.name) == ("prose", "code") and table.token_ids == (3, 5, 7)
    assert prose.weights[0] > 0 > code.weights[0]
    # 5 is never in the second text, 7 never in the first.
    assert prose.log_shares[1] > code.log_shares[1] and prose.log_shares[2] < code.log_shares[2]
    assert prose.weights[2] == 0


def test_a_text_without_delimiters_weighs_nothing():
    text = cut_text(3, 5)
    bare = text._replace(candidate=np.zeros(TOKENS, bool), domain="cjk")
    table = delimiter_table([bare, text], Regions(10, 5, 1.0), 12)
    assert set(table.domains[0].weights) == {0} and len(set(table.domains[0].log_shares)) == 1
    assert table.candidates == (0, 8)


@pytest.mark.parametrize("every", [1, 3])
def test_online_scores_are_the_slow_statement_of_the_text_at_hand(every: int):
    """With every query the reference; with few what these say; at the text's ends what there is."""
    regions, layers = Regions(8, 6, 1.5), [layer(0), layer(1, softcap=2.0), layer(2, scale=0.9)]
    candidate = np.zeros(TOKENS, bool)
    candidate[[0, 3, 19, 40, TOKENS - 3, TOKENS - 1]] = True
    text = DomainText("here", np.zeros(TOKENS, np.int64), candidate, layers)
    found = online_scores(text, regions, every=every)
    assert np.isnan(found[~candidate]).all() and np.isnan(found[-1]) and not np.isnan(found[[0, 3, TOKENS - 3]]).any()
    for i in (19, 40):
        # Regions are the candidate's for all of its queries.
        expected = np.mean([_paid(layers, i, i + 1 + q, regions) for q in range(0, regions.future, every)])
        assert found[i] == pytest.approx(expected, abs=1e-5)
        assert every > 1 or found[i] == pytest.approx(candidate_score(layers, i, regions), abs=1e-5)


def _paid(layers: list[LayerAttention], i: int, query: int, regions: Regions) -> float:
    """What one query pays to a candidate's regions."""
    paid = []
    for of in layers:
        for h, rows in enumerate(of.query.astype(np.float64)):
            logits = of.key[h // 2, : query + 1].astype(np.float64) @ rows[query] * (of.scale or DIM**-0.5)
            logits = of.softcap * np.tanh(logits / of.softcap) if of.softcap else logits
            weights = np.exp(logits) / np.exp(logits).sum()
            first = i + 1 - regions.retained
            paid.append(weights[first : i + 1].sum() - regions.alpha * weights[:first].sum())
    return float(np.mean(paid))


def test_online_splitting_tells_occurrences_of_one_delimiter_apart():
    """Two places of one token in each window: behind one of them the far past is needed. A table has one weight."""
    regions = Regions(6, 4, 1.0)
    tokens = np.full(TOKENS, 9)
    query, key = np.zeros((1, TOKENS, DIM), np.float32), np.zeros((1, TOKENS, DIM), np.float32)
    key[0, :6, 0] = 8
    query[0, :, 0] = -4
    tokens[[17, 21, 37, 41]] = 3
    # What comes behind 21 and behind 37 looks at the beginning.
    query[0, 22:26, 0] = query[0, 38:42, 0] = 4
    text = DomainText("here", tokens, tokens == 3, [LayerAttention(query, key, 0.0, 0.0)])
    rule = BlockRule(base=20, search=5)
    table = delimiter_table([text], regions, 12)
    weighed = rule.model_copy(update={"token_ids": table.token_ids, "domains": table.domains})
    by_table = segment(weighed, tokens.tolist(), tokens == 3)
    online = segment_online(text, rule, regions)
    assert online[:2] == [18, 24] and by_table[:2] == [18, 20]


def test_online_splitting_of_a_text_without_delimiters_is_hard():
    text = DomainText("here", np.full(TOKENS, 9), np.zeros(TOKENS, bool), [layer(0)])
    assert segment_online(text, BlockRule(base=16, search=4), Regions(8, 4, 1.0)) == [16] * 5
