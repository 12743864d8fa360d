import math

import pytest
import torch

from icetransfer.data.loader import Batch
from icetransfer.training.diagnosis import diagnose, moments, spread, token_entropy

HEALTHY = {"spread": 0.9, "deaf_loss": 1.54, "ctc_loss": 0.35, "pruned_loss": 0.2}


def test_the_spread_is_the_varying_share_of_the_power():
    torch.manual_seed(1)
    lengths = torch.tensor([40, 25])
    varying = torch.randn(2, 40, 8)
    sums, frames = moments(varying, lengths), float(lengths.sum())
    assert spread(sums, frames) == pytest.approx(1, abs=0.05)
    constant = torch.ones(2, 40, 8) * torch.arange(1.0, 9)
    assert spread(moments(constant, lengths), frames) == pytest.approx(0, abs=1e-6)
    both = math.sqrt(3) * torch.ones(2, 40, 8) + varying  # three parts of four are constant
    assert spread(moments(both, lengths), frames) == pytest.approx(0.25, abs=0.05)
    assert spread(torch.zeros(9), 0) == 0


def test_padding_does_not_count():
    lengths = torch.tensor([3, 2])
    out = torch.randn(2, 3, 4)
    padded = out.clone()
    padded[1, 2] = torch.nan_to_num(torch.tensor(1e6))
    assert torch.equal(moments(out, lengths)[:4], moments(padded, lengths)[:4])


def test_sums_of_two_batches_give_the_spread_of_both():
    out, lengths = torch.randn(4, 10, 3) + 1, torch.full((4,), 10)
    whole = spread(moments(out, lengths), 40)
    halves = moments(out[:2], lengths[:2]) + moments(out[2:], lengths[2:])
    assert spread(halves, 40) == pytest.approx(whole, abs=1e-6)


def make_batch(tokens, lengths):
    return Batch(
        ids=("a", "b"),
        features=torch.zeros(2, 9, 80),
        feature_lens=torch.tensor([9, 9]),
        tokens=torch.tensor(tokens),
        token_lens=torch.tensor(lengths),
        seconds=1.0,
    )


def test_the_entropy_is_of_the_tokens_without_their_padding():
    batch = make_batch([[3, 4, 3, 4], [3, 4, 0, 0]], [4, 2])
    assert token_entropy([batch]) == pytest.approx(6 * math.log(2))
    assert token_entropy([batch, batch]) == pytest.approx(12 * math.log(2))
    assert token_entropy([make_batch([[3, 3], [3, 3]], [2, 2])]) == 0
    assert token_entropy([]) == 0


# The measured ones are of a Dutch cell of 30 minutes from the ML base, batches of 16 s.
@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        pytest.param({}, None, id="healthy"),
        pytest.param({"spread": 0.02}, "hardly depends on its input", id="constant"),
        pytest.param(  # everything at the full rate, 500 steps: WER 96.7
            {"spread": 0.27, "ctc_loss": 1.518, "pruned_loss": 0.707},
            "CTC head has learned next to nothing",
            id="measured-deaf",
        ),
        pytest.param(  # a tenth of the rate, after 500 of 2,500 steps: WER 93.5
            {"ctc_loss": 0.346, "pruned_loss": 0.757},
            "joiner has not begun to listen",
            id="measured-joiner",
        ),
        pytest.param(  # and after all of them: WER 3.3
            {"ctc_loss": 0.065, "pruned_loss": 0.0136}, None, id="measured-good"
        ),
        pytest.param({"ctc_loss": 0.0, "pruned_loss": 0.3}, None, id="no-ctc-head"),
        pytest.param({"ctc_loss": 0.05, "pruned_loss": 0.08}, None, id="both-low"),
    ],
)
def test_what_is_said(numbers, said):
    found = diagnose(HEALTHY | numbers)
    if said is None:
        assert found is None
    else:
        assert said in found and "train." in found
