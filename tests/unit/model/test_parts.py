"""Names of parts of a model."""

import pytest

from icetransfer.config import load_config
from icetransfer.model.parts import by_parameter, is_in

NAMES = [f"encoder.encoders.{i}.norm.bias" for i in range(12)] + ["joiner.weight"]


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("encoder", 12),
        ("encoder.encoders.1", 1),  # not 10 and 11
        ("encoder.encoders.0-2", 3),
        ("encoder.encoders.9-11.norm", 3),
        ("encoder.enc", 0),
        ("joiner.weight", 1),
        ("joiner.weight.more", 0),
    ],
)
def test_a_part_is_a_prefix_in_whole_components(part: str, count: int) -> None:
    assert sum(is_in(name, part) for name in NAMES) == count


def test_the_most_specific_part_wins() -> None:
    values = {"encoder.encoders.1-2": 2, "encoder": 1, "encoder.encoders.2.norm": 3}
    found = by_parameter(values, NAMES, 0, "train.freeze")
    assert [found[name] for name in NAMES[:4]] == [1, 2, 3, 1]
    assert found["joiner.weight"] == 0


def test_a_part_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train\.freeze: the part encoder\.encoder\.1 matches no"):
        by_parameter({"encoder.encoder.1": 1}, NAMES, 0, "train.freeze")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("transfer.parts=[encodr]", "did you mean encoder"),
        ("transfer.parts=['encoder.0-']", "written like encoder"),
        ("train.freeze={joinr: 3}", "did you mean joiner"),
        ("train.lr_scale={joiner: 0}", "more than 0"),
    ],
)
def test_a_bad_name_fails_with_the_config(setting: str, message: str) -> None:
    corpora = "data.corpora={a: {kind: folder, path: x}}"
    with pytest.raises(ValueError, match=message):
        load_config([], ["language=nl", corpora, setting])
