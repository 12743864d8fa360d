"""ScaledAdam's and the schedules' behaviour."""

import pytest
import torch
from torch import nn

from icetransfer.training.optim import Cooldown, Eden, ScaledAdam


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_grads(tensors: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator)


def test_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    target = x[:, :1] * x[:, 1:2]
    optimizer = ScaledAdam(model.parameters(), lr=0.045, clipping_scale=2.0)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_resume_is_exact(tmp_path) -> None:
    shapes = [(3, 4), (3, 4), (5,), (), (1,), (2, 3, 2)]
    whole, first = params(*shapes), params(*shapes)
    one, two = (ScaledAdam(p, lr=0.04, clipping_scale=2.0) for p in (whole, first))
    for step in range(30):
        set_grads(whole, step)
        one.step()
        if step < 13:
            set_grads(first, step)
            two.step()
    torch.save({"params": first, "optimizer": two.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=False)
    rest = saved["params"]
    three = ScaledAdam(rest, lr=0.01, clipping_scale=2.0)
    three.load_state_dict(saved["optimizer"])
    for step in range(13, 30):
        set_grads(rest, step)
        three.step()
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a, b)


def test_does_not_change_gradients_or_need_them() -> None:
    a, b, c = params((3, 2), (3, 2), (4,))
    optimizer = ScaledAdam([a, b, c], lr=0.1, clipping_scale=2.0)
    before = b.detach().clone()
    for _ in range(5):
        a.grad = torch.ones(3, 2)
        c.grad = torch.ones(4)
        optimizer.step()
        assert torch.equal(a.grad, torch.ones(3, 2))
    assert torch.equal(b, before)


def test_groups_have_their_own_rate() -> None:
    a, b = params((3, 2), (3, 2))
    b.data.copy_(a.data)
    optimizer = ScaledAdam([{"params": [a], "lr": 0.02}, {"params": [b]}], lr=0.01)
    start = a.detach().clone()
    a.grad = b.grad = torch.ones(3, 2)
    optimizer.step()
    torch.testing.assert_close(a - start, 2 * (b - start), rtol=1e-3, atol=1e-6)


def test_group_added_later() -> None:
    a, b = params((3, 2), (4,))
    optimizer = ScaledAdam([a], lr=0.01)
    set_grads([a, b], 0)
    optimizer.step()
    optimizer.add_param_group({"params": [b]})
    before = b.detach().clone()
    optimizer.step()
    assert not torch.equal(b, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_bad_gradient_is_a_lost_step_only(bad: float | None) -> None:
    tensors = params((3, 2), (4,), ())
    optimizer = ScaledAdam([{"params": tensors[:2]}, {"params": tensors[2:]}], clipping_scale=2.0)
    for step in range(50):
        set_grads(tensors, step)
        before = [p.detach().clone() for p in tensors]
        skip = torch.tensor(step == 17 and bad is None)
        if step == 17 and bad is not None:
            tensors[0].grad[0, 0] = bad
        optimizer.step(skip=skip)
        # The scalar stands in another group, and is spared too.
        moved = [not torch.equal(p, old) for p, old in zip(tensors, before, strict=True)]
        assert moved == [step != 17] * 3
    assert all(torch.isfinite(p).all() for p in tensors)


def test_a_frozen_group_stays_as_it_is_and_wakes_as_if_new() -> None:
    frozen, new = params((3, 2)), params((3, 2))
    optimizer = ScaledAdam([{"params": params((4,))}, {"params": frozen}], lr=0.01)
    frozen[0].requires_grad_(False)
    for step in range(5):
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    assert torch.equal(frozen[0], new[0])
    frozen[0].requires_grad_(True)
    other = ScaledAdam(new, lr=0.01)
    for step in range(5):
        set_grads(frozen, step)
        set_grads(new, step)
        optimizer.step()
        other.step()
    assert torch.equal(frozen[0], new[0])


def test_only_bad_gradients_is_an_error() -> None:
    tensors = params((3, 2))
    optimizer = ScaledAdam(tensors, lr=0.01, clipping_scale=2.0)
    with pytest.raises(FloatingPointError, match=r"step 10 .* not finite"):
        for _ in range(12):
            tensors[0].grad = torch.full((3, 2), float("nan"))
            optimizer.step()


def test_scalars_stay_bounded() -> None:
    scalar = nn.Parameter(torch.tensor(9.9))
    optimizer = ScaledAdam([scalar], lr=1.0)
    for _ in range(200):
        scalar.grad = torch.tensor(-1.0)
        optimizer.step()
    assert 9.9 < scalar.item() < 10.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"clipping_scale": -1.0}, "clipping_scale is -1.0"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledAdam(params((2,)), **settings)


def test_eden_position_is_saved() -> None:
    first, second = (ScaledAdam(params((2,)), lr=0.045) for _ in range(2))
    eden = Eden(first, lr_batches=1000, lr_epochs=4, warmup_batches=0)
    assert first.param_groups[0]["lr"] == 0.045
    eden.step_epoch(3)
    eden.step_batch(700)
    other = Eden(second, lr_batches=1000, lr_epochs=4, warmup_batches=0)
    other.load_state_dict(eden.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] < 0.04


def test_a_new_schedule_starts_from_the_base_rate() -> None:
    optimizer = ScaledAdam(params((2,)), lr=0.045)
    Eden(optimizer, lr_batches=10, lr_epochs=1).step_batch(10_000)
    resumed = ScaledAdam(params((2,)), lr=0.045)
    resumed.load_state_dict(optimizer.state_dict())
    schedule = Cooldown(resumed, max_steps=100, warmup_batches=0)
    schedule.step_batch(1)
    assert resumed.param_groups[0]["lr"] == 0.045


def test_cooldown() -> None:
    optimizer = ScaledAdam(params((2,)), lr=0.04)
    schedule = Cooldown(
        optimizer, max_steps=200, warmup_batches=20, warmup_start=0.5, cooldown=0.5, floor=0.1
    )
    rates = {}
    for batch in (0, 10, 20, 99, 100, 150, 200, 300):
        schedule.step_batch(batch)
        rates[batch] = optimizer.param_groups[0]["lr"] / 0.04
    assert rates == pytest.approx(
        {0: 0.5, 10: 0.75, 20: 1.0, 99: 1.0, 100: 1.0, 150: 0.55, 200: 0.1, 300: 0.1}
    )
    schedule.step_epoch(5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.004)


def test_no_cooldown_is_constant() -> None:
    optimizer = ScaledAdam(params((2,)), lr=0.04)
    schedule = Cooldown(optimizer, max_steps=10, warmup_batches=0, cooldown=0.0)
    assert [schedule.factor(batch) for batch in (0, 5, 10)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"cooldown": 1.5}, {"floor": -0.1}])
def test_bad_cooldown(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Cooldown"):
        Cooldown(ScaledAdam(params((2,)), lr=0.04), **({"max_steps": 10} | settings))


def test_one_type_per_group() -> None:
    a, b = params((3, 2), (4,))
    b.data = b.data.double()
    a.grad, b.grad = torch.ones(3, 2), torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        ScaledAdam([a, b], lr=0.01).step()
    ScaledAdam([{"params": [a]}, {"params": [b]}], lr=0.01).step()


def test_a_scale_that_is_too_large_at_first_is_no_error() -> None:
    tensors = params((3, 2))
    optimizer = ScaledAdam(tensors, lr=0.01, clipping_scale=2.0)
    before = tensors[0].detach().clone()
    for step in range(25):  # as a GradScaler in half precision
        found = step < 12
        optimizer.found_inf = torch.tensor(float(found))
        tensors[0].grad = torch.full((3, 2), float("inf") if found else 1.0)
        optimizer.step()
        assert torch.equal(tensors[0], before) == found
