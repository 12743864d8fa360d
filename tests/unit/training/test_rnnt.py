"""The transducer loss against an enumeration of all paths, and its behaviour on odd input."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from icetransfer.training import rnnt


def log_prob_of_all_paths(log_probs: Tensor, symbols: list[int], rnnt_type: str) -> float:
    """Sum over every path of one sequence; log_probs (T, S+1, V), blank 0."""
    T, S = log_probs.shape[0], len(symbols)
    total = -math.inf
    if rnnt_type == "modified":
        # In each frame blank or one symbol.
        for frames in itertools.combinations(range(T), S):
            s, score = 0, 0.0
            for t in range(T):
                emits = t in frames
                score += log_probs[t, s, symbols[s] if emits else 0].item()
                s += emits
            total = torch.logaddexp(torch.tensor(total), torch.tensor(score)).item()
        return total
    # The last arc is a blank; the symbols stand anywhere before it.
    for places in itertools.combinations(range(T + S - 1), S):
        s, t, score = 0, 0, 0.0
        for i in range(T + S):
            if i in places:
                score += log_probs[t, s, symbols[s]].item()
                s += 1
            else:
                score += log_probs[t, s, 0].item()
                t += 1
        total = torch.logaddexp(torch.tensor(total), torch.tensor(score)).item()
    return total


@pytest.fixture
def lattice() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "logits": torch.randn(2, 4, 4, 5, generator=generator, dtype=torch.float64),
        "am": torch.randn(2, 4, 5, generator=generator, dtype=torch.float64),
        "lm": torch.randn(2, 4, 5, generator=generator, dtype=torch.float64),
        "symbols": torch.tensor([[1, 4, 2], [3, 3, 0]]),
        "boundary": torch.tensor([[0, 0, 3, 4], [0, 0, 2, 3]]),
    }


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
def test_is_the_sum_over_all_paths(lattice: dict[str, Tensor], rnnt_type: str) -> None:
    loss = rnnt.rnnt_loss(
        lattice["logits"], lattice["symbols"], 0, lattice["boundary"], rnnt_type, reduction="none"
    )
    for n, (_, _, S, T) in enumerate(lattice["boundary"].tolist()):
        log_probs = lattice["logits"][n].log_softmax(-1)[:T]
        expected = log_prob_of_all_paths(log_probs, lattice["symbols"][n, :S].tolist(), rnnt_type)
        assert loss[n].item() == pytest.approx(-expected, rel=1e-6)


def test_simple_is_the_additive_joiner(lattice: dict[str, Tensor]) -> None:
    logits = lattice["am"].unsqueeze(2) + lattice["lm"].unsqueeze(1)
    args = (lattice["symbols"], 0, lattice["boundary"])
    expected = rnnt.rnnt_loss(logits, *args, reduction="none")
    loss = rnnt.rnnt_loss_simple(lattice["lm"], lattice["am"], *args, reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.0), (0.2, 0.1)])
def test_gradients_are_numerical_ones(
    lattice: dict[str, Tensor], rnnt_type: str, scales: tuple[float, float]
) -> None:
    def loss(lm: Tensor, am: Tensor) -> Tensor:
        return rnnt.rnnt_loss_smoothed(
            lm, am, lattice["symbols"], 0, *scales, lattice["boundary"], rnnt_type, 0.01, "none"
        )

    inputs = tuple(lattice[name].requires_grad_() for name in ("lm", "am"))
    assert torch.autograd.gradcheck(loss, inputs)

    def joint_loss(logits: Tensor) -> Tensor:
        return rnnt.rnnt_loss(
            logits, lattice["symbols"], 0, lattice["boundary"], rnnt_type, reduction="none"
        )

    assert torch.autograd.gradcheck(joint_loss, (lattice["logits"].requires_grad_(),))


def test_occupations_count_the_arcs(lattice: dict[str, Tensor]) -> None:
    """Every symbol is emitted once, and every frame is left by one blank (regular lattice)."""
    _, (px_grad, py_grad) = rnnt.rnnt_loss_simple(
        lattice["lm"],
        lattice["am"],
        lattice["symbols"],
        0,
        lattice["boundary"],
        return_grad=True,
    )
    assert px_grad.shape == (2, 3, 5)
    assert py_grad.shape == (2, 4, 4)
    torch.testing.assert_close(
        px_grad.sum(2), torch.tensor([[1.0, 1, 1], [1, 1, 0]], dtype=torch.float64)
    )
    torch.testing.assert_close(
        py_grad.sum(1), torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.float64)
    )


def test_padding_does_not_count(lattice: dict[str, Tensor]) -> None:
    args = (lattice["symbols"][:, :2], 0, lattice["boundary"][1:])
    alone = rnnt.rnnt_loss(lattice["logits"][1:, :3, :3], *(args[0][1:], *args[1:]))
    logits = lattice["logits"].clone()
    logits[1, 3:] = 1e4
    logits[1, :, 3:] = 1e4
    batch = rnnt.rnnt_loss(logits, lattice["symbols"], 0, lattice["boundary"], reduction="none")
    torch.testing.assert_close(batch[1], alone)


def test_reductions(lattice: dict[str, Tensor]) -> None:
    args = (lattice["logits"], lattice["symbols"], 0, lattice["boundary"], "regular", 0.0)
    each = rnnt.rnnt_loss(*args, reduction="none")
    torch.testing.assert_close(rnnt.rnnt_loss(*args), each.mean())
    torch.testing.assert_close(rnnt.rnnt_loss(*args, reduction="sum"), each.sum())


def test_long_peaky_lattice_stays_finite() -> None:
    """Scores of 10^5 nats, where float32 sums have lost the arcs' probabilities."""
    generator = torch.Generator().manual_seed(1)
    am = (100 * torch.randn(1, 1500, 30, generator=generator)).requires_grad_()
    lm = (100 * torch.randn(1, 201, 30, generator=generator)).requires_grad_()
    symbols = torch.randint(1, 30, (1, 200), generator=generator)
    loss, (px_grad, py_grad) = rnnt.rnnt_loss_simple(lm, am, symbols, 0, return_grad=True)
    loss.backward()
    assert loss.item() > 1e5
    assert torch.isfinite(am.grad).all() and torch.isfinite(lm.grad).all()
    torch.testing.assert_close(px_grad.sum(2), torch.ones(1, 200), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(py_grad.sum(1), torch.ones(1, 1500), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
def test_ranges_always_leave_a_path(rnnt_type: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for s_range in (2, 3, 5):
        T, S, N = 12, 9, 8
        symbol_lens = torch.randint(0, S + 1, (N,), generator=generator)
        frame_lens = torch.maximum(torch.randint(6, T + 1, (N,), generator=generator), symbol_lens)
        zeros = torch.zeros_like(symbol_lens)
        boundary = torch.stack((zeros, zeros, symbol_lens, frame_lens), dim=1)
        symbols = torch.randint(1, 7, (N, S), generator=generator)
        am = 5 * torch.randn(N, T, 7, generator=generator)
        lm = 5 * torch.randn(N, S + 1, 7, generator=generator)
        _, grads = rnnt.rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, return_grad=True)
        ranges = rnnt.get_rnnt_prune_ranges(*grads, boundary, s_range)
        start = ranges[:, :, 0]
        jumps = start.diff(dim=1)
        assert (start[:, 0] == 0).all()
        assert jumps.min() >= 0
        assert jumps.max() <= (s_range - 1 if rnnt_type == "regular" else 1)
        assert ranges.max() <= S
        logits = torch.randn(N, T, s_range, 7, generator=generator)
        loss = rnnt.rnnt_loss_pruned(
            logits, symbols, ranges, 0, boundary, rnnt_type, reduction="none"
        )
        assert torch.isfinite(loss).all()


def test_no_path_is_infinite_without_gradient() -> None:
    ranges = torch.tensor([[[0, 1], [0, 1], [0, 1]]])
    logits = torch.zeros(1, 3, 2, 4, requires_grad=True)
    loss = rnnt.rnnt_loss_pruned(logits, torch.tensor([[1, 2, 3]]), ranges, 0)
    loss.backward()
    assert loss.item() == math.inf
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnnt_type": "constrained"}, "type is 'constrained'"),
        ({"reduction": "median"}, "reduction is 'median'"),
        ({"termination_symbol": 5}, "termination symbol 5 is outside"),
        ({"symbols": torch.zeros(2, 2, dtype=torch.int64)}, "symbols are"),
        ({"boundary": torch.zeros(2, 3, dtype=torch.int64)}, "boundary is"),
        ({"boundary": torch.tensor([[0, 0, 3, 4], [0, 1, 2, 3]])}, "sequence 1 .* begin"),
        ({"boundary": torch.tensor([[0, 0, 3, 5], [0, 0, 2, 3]])}, "sequence 0 .* 1 to 4 frames"),
        ({"boundary": torch.tensor([[0, 0, 3, 4], [0, 0, 2, 0]])}, "sequence 1 .* 1 to 4 frames"),
    ],
)
def test_errors_name_the_trouble(
    lattice: dict[str, Tensor], change: dict[str, object], message: str
) -> None:
    arguments = {
        "lm": lattice["lm"],
        "am": lattice["am"],
        "symbols": lattice["symbols"],
        "termination_symbol": 0,
        "boundary": lattice["boundary"],
    }
    with pytest.raises(ValueError, match=message):
        rnnt.rnnt_loss_smoothed(**(arguments | change))
