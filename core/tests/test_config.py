import json
from dataclasses import asdict, dataclass, field, replace

import pytest

from onestage.config import BackboneConfig, InputConfig, ScheduleConfig, config_from_dict
from onestage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Nested:
    grid: tuple[int, int] = (1, 1)
    radius: float | None = 1.5
    input: InputConfig = field(default_factory=InputConfig)


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(deformable_stages=(3, 4)),
        ScheduleConfig(clip_norm=10.0, milestones=(3,)),
        Nested(grid=(2, 3), radius=None, input=replace(InputConfig(), train_sizes=((1, 2), (3, 4)))),
    ],
)
def test_a_config_survives_json(config):
    assert config_from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config


def test_a_key_that_is_absent_keeps_its_default():
    assert config_from_dict(Nested, {"radius": 2}) == Nested(radius=2.0)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"grids": [2, 2]}, "file.json: unknown key 'grids'; nearest: 'grid'"),
        ({"grid": [2]}, "file.json.grid is [2]"),
        ({"grid": [2, 2.5]}, "file.json.grid[1] is 2.5; expected int"),
        ({"radius": "near"}, "file.json.radius is 'near'; expected float"),
        ({"input": {"resize": "crop"}}, "file.json.input.resize is 'crop'; expected 'keep_ratio' | 'fixed'"),
        ({"input": {"antialias": 1}}, "file.json.input.antialias is 1; expected bool"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(values, what):
    with pytest.raises(UsageError) as caught:
        config_from_dict(Nested, values, "file.json")
    assert caught.value.what.startswith(what)
