"""Averages: what they refuse, and entries that are not weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from icetransfer.average import average_files
from icetransfer.model.averaging import (
    average_models,
    average_range,
    start_average,
    update_averaged_model,
)
from icetransfer.model.checkpoint import load_transducer, read_checkpoint
from icetransfer.model.transducer import TransducerDims, build_transducer


def checkpoint(step: int, value: float, period: int = 1) -> dict[str, object]:
    return {
        "model_avg": {"w": torch.full((2,), value)},
        "batch_idx_train": step,
        "average_period": period,
    }


def test_range_is_the_mean_of_the_steps_between() -> None:
    # Steps 1..10 hold 1.0, steps 11..40 hold 5.0.
    average = average_range(checkpoint(10, 1.0), checkpoint(40, (10 * 1.0 + 30 * 5.0) / 40))
    torch.testing.assert_close(average["w"], torch.full((2,), 5.0))
    assert average["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (checkpoint(10, 1.0), checkpoint(10, 1.0), "no model was averaged"),
        (checkpoint(10, 1.0, 8), checkpoint(15, 1.0, 8), "no model was averaged"),
        ({"model": {}}, checkpoint(10, 1.0), "first checkpoint has no model_avg"),
        (checkpoint(10, 1.0), {**checkpoint(20, 1.0), "batch_idx_train": None}, "last .* no batch"),
        (
            {**checkpoint(10, 1.0), "model_avg": {"w": torch.zeros(3)}},
            checkpoint(20, 1.0),
            "model 1 of 2 .*'w'",
        ),
    ],
)
def test_range_errors(start: dict, end: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_range(start, end)


def test_models_errors() -> None:
    with pytest.raises(ValueError, match="no model"):
        average_models([])
    with pytest.raises(ValueError, match=r"model 1 of 2 .*'b'"):
        average_models([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}])


def test_types_and_integers() -> None:
    models = [{"w": torch.tensor([x]).half(), "n": torch.tensor(i)} for i, x in enumerate((1.0, 2))]
    average = average_models(models)
    assert average["w"].dtype == torch.float16 and average["w"].item() == 1.5
    assert average["n"].item() == 1


def test_running_average_from_a_file_with_shared_storage() -> None:
    """A tied entry whose storage is shared in the average is still averaged once."""
    model = nn.Module()
    model.a = model.b = nn.Parameter(torch.tensor([3.0]))
    averaged = start_average(model)
    averaged["b"] = averaged["a"]
    model.a.data.fill_(6.0)
    update_averaged_model(3, 3, model, averaged)
    model.a.data.fill_(0.0)
    update_averaged_model(4, 3, model, averaged)
    assert averaged["a"].item() == averaged["b"].item() == 6.0
    update_averaged_model(6, 3, model, averaged)
    assert averaged["a"].item() == averaged["b"].item() == 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, nano_dims: TransducerDims) -> Path:
    """icefall's epoch-1.pt to epoch-4.pt, whose running averages are of 10 steps an epoch."""
    made = tmp_path_factory.mktemp("epochs")
    for epoch in range(1, 5):
        weights = build_transducer(nano_dims, seed=epoch).state_dict()
        torch.save(
            {
                "model": {f"module.{name}": value for name, value in weights.items()},
                "model_avg": {name: value.double() for name, value in weights.items()},
                "batch_idx_train": 10 * epoch,
                "average_period": 10,
            },
            made / f"epoch-{epoch}.pt",
        )
    return made


def seeds(dims: TransducerDims, *numbers: int) -> list[torch.Tensor]:
    name = "joiner.output_linear.weight"
    return [build_transducer(dims, seed=n).state_dict()[name] for n in numbers]


def test_files_are_averaged_by_name_or_the_last_of_a_folder(
    folder: Path, nano_dims: TransducerDims, tmp_path: Path
) -> None:
    out = tmp_path / "averaged.pt"
    one, three, four = seeds(nano_dims, 1, 3, 4)
    named = f"checkpoints={folder}/epoch-1.pt,{folder}/epoch-4.pt"
    for words, expected in (
        ([named], (one + four) / 2),
        ([f"checkpoints={folder}", "last=2"], (three + four) / 2),
        ([named, "method=range"], (40 * four - 10 * one) / 30),
    ):
        average_files([*words, f"out={out}", "num_heads=2"])
        found = load_transducer(out).joiner.output_linear.weight
        torch.testing.assert_close(found, expected)
    assert read_checkpoint(out).extra["averaged_files"][0].endswith("epoch-1.pt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoints=a.pt"], "expected checkpoints=A.pt,B.pt out=F.pt"),
        (["checkpoints=a.pt", "out=b.pt", "stray"], "expected checkpoints="),
        (["checkpoints=a.pt", "out=b.pt", "method=best"], "expected models or range"),
        (["checkpoints=a.pt", "out=b.pt", "method=range"], "the first and the last"),
        (["checkpoints=FOLDER", "last=0", "out=b.pt"], "last=0: expected"),
        (["checkpoints=FOLDER", "last=5", "out=b.pt"], "has 4 checkpoints .*, but last=5"),
    ],
)
def test_mistakes_of_the_command(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_files([word.replace("FOLDER", str(folder)) for word in words])
