"""Attention weights against a direct computation, with their gradients."""

import pytest
import torch

from icetransfer.model.attention import (
    MASKED_SCORE,
    AttentionWeights,
    CompactRelPositionalEncoding,
    _CappedSoftmax,
    score_caps,
    shift_to_keys,
)


@pytest.mark.parametrize(("queries", "left"), [(1, 0), (1, 3), (4, 0), (5, 6)])
def test_shift_picks_key_minus_query(queries: int, left: int) -> None:
    keys = queries + left
    offsets = torch.arange(1 - keys, queries, dtype=torch.float32)
    scores = offsets.expand(2, 3, queries, -1)
    expected = torch.arange(keys) - left - torch.arange(queries).unsqueeze(1)
    assert torch.equal(shift_to_keys(scores, keys), expected.float().expand(2, 3, -1, -1))


@pytest.mark.parametrize(("queries", "left"), [(1, 2), (4, 0), (3, 4)])
def test_capped_softmax(queries: int, left: int) -> None:
    torch.manual_seed(0)
    keys = queries + left
    content = torch.randn(2, 3, queries, keys, dtype=torch.float64, requires_grad=True)
    position = torch.randn(
        2, 3, queries, keys + queries - 1, dtype=torch.float64, requires_grad=True
    )
    hidden = torch.rand(3, queries, keys) < 0.4
    hidden[0, 0] = True  # a query that may see nothing
    caps = score_caps(hidden, torch.float64)
    scores = content + shift_to_keys(position, keys)
    expected = torch.softmax(scores.masked_fill(hidden, MASKED_SCORE), dim=-1)
    actual = _CappedSoftmax.apply(content, position, caps)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(
        lambda c, p: _CappedSoftmax.apply(c, p, caps), (content, position)
    )


def test_position_table_grows_and_keeps_its_values() -> None:
    encoding = CompactRelPositionalEncoding(8)
    short = encoding(torch.empty(1, 5, 1))
    long = encoding(torch.empty(1, 50, 1), left_context=7)
    assert short.shape == (9, 8)
    assert long.shape == (2 * 50 + 7 - 1, 8)
    again = encoding(torch.empty(1, 5, 1))
    torch.testing.assert_close(again, short)
    torch.testing.assert_close(long[56 - 4 : 56 + 5], short)
    assert (short[:, -1] == 1).all()
    assert short.unique(dim=0).shape == short.shape
    assert not encoding.state_dict()


def test_weights_sum_to_one_over_what_is_visible() -> None:
    attention = AttentionWeights(12, pos_dim=8, num_heads=3, query_head_dim=4, pos_head_dim=2)
    x = torch.randn(2, 6, 12)
    hidden = torch.zeros(2, 1, 6, dtype=torch.bool)
    hidden[1, 0, 4:] = True
    pos_emb = CompactRelPositionalEncoding(8)(x)
    weights = attention(x, pos_emb, score_caps(hidden, x.dtype))
    assert weights.shape == (3, 2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))
    assert (weights[:, 1, :, 4:] == 0).all()
