from dataclasses import dataclass, field, replace

import pytest

from onestage.config import BackboneConfig, InputConfig, ScheduleConfig
from onestage.tables.spec import AP, Claim, Row, Table, columns, higher, printed, small_config, with_field


@dataclass(frozen=True, kw_only=True)
class Inference:
    threshold: float = 0.05
    nms: str = "greedy"


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 80
    width: int = 256
    grid: tuple[int, int] = (2, 2)
    iou: float = 0.7
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    input: InputConfig = field(default_factory=InputConfig)
    inference: Inference = field(default_factory=Inference)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


BASE = Config()
DEMO = Config(
    num_classes=3,
    width=64,
    iou=0.6,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    inference=Inference(threshold=0.1),
    schedule=ScheduleConfig(length=500, unit="steps"),
)


def row(name="a", **arguments):
    return Row(name=name, paper={}, **({"config": BASE} | arguments))


def table(*rows, **arguments):
    return Table(
        **{"number": "2a", "caption": "", "columns": {"segm/AP": "AP"}, "split": "val2017", "rows": rows} | arguments
    )


def test_small_config_is_the_demo_with_the_switches_of_the_row():
    config = replace(BASE, grid=(1, 1), inference=Inference(nms="fast"))
    small = small_config(row(config=config), BASE, DEMO)
    assert small == replace(DEMO, grid=(1, 1), inference=Inference(nms="fast", threshold=0.1))


def test_small_config_keeps_trunk_sizes_and_recipe_of_the_demo():
    config = replace(
        BASE,
        width=128,
        backbone=BackboneConfig(name="resnet101", deformable_stages=(3, 4)),
        input=InputConfig(test_size=(500, 833)),
        schedule=ScheduleConfig(length=36),
    )
    small = small_config(row(config=config), BASE, DEMO)
    assert small == replace(DEMO, backbone=replace(DEMO.backbone, deformable_stages=(3, 4)))


def test_what_the_demo_has_of_its_own_stays_unless_the_row_switches_it():
    assert small_config(row(), BASE, DEMO).iou == 0.6
    assert small_config(row(config=replace(BASE, iou=0.5)), BASE, DEMO).iou == 0.5


def test_small_fields_of_a_row_win():
    small = small_config(row(small={"backbone.name": "resnet34", "width": 32}), BASE, DEMO)
    assert (small.backbone.name, small.backbone.norm, small.width) == ("resnet34", "train", 32)


def test_unknown_field_is_refused():
    with pytest.raises(AttributeError, match="treshold"):
        with_field(BASE, "inference.treshold.low", 1)
    with pytest.raises(TypeError, match="treshold"):
        with_field(BASE, "inference.treshold", 1)


@pytest.mark.parametrize("arguments", [{"config": None}, {"why_not": "cited"}])
def test_a_row_has_either_a_config_or_a_reason(arguments):
    with pytest.raises(ValueError, match="config or the reason"):
        row(**arguments)


def test_names_of_rows_are_unique():
    with pytest.raises(ValueError, match="not unique"):
        table(row("a"), row("a"))


def test_numbers_stand_in_columns_of_the_table():
    with pytest.raises(ValueError, match="bbox/AP"):
        table(replace(row("a"), paper={"bbox/AP": "1.0"}))


def test_a_claim_compares_rows_and_columns_that_are_there():
    claim = Claim(higher="b", lower="a", column="segm/AP")
    assert table(row("a"), row("b"), claims=(claim,)).row("b").name == "b"
    with pytest.raises(ValueError, match="not there"):
        table(row("a"), claims=(claim,))
    with pytest.raises(ValueError, match="not there"):
        table(row("a"), row("b"), claims=(replace(claim, column="fps"),))


@pytest.mark.parametrize(
    ("number", "printed", "title", "session"),
    [
        ("2a", "", "Table 2a", "table2"),
        ("figure5", "", "Figure 5", "figure5"),
        ("4", "Table IV", "Table IV", "table4"),
    ],
)
def test_number_decides_title_and_session(number, printed, title, session):
    found = table(row(), number=number, printed=printed)
    assert (found.title, found.session) == (title, session)


def test_a_printed_line_becomes_columns_without_its_dashes():
    assert printed(("fps", *columns("segm", AP[:3])), "- 29.2 49.5 30.0") == {
        "segm/AP": "29.2",
        "segm/AP50": "49.5",
        "segm/AP75": "30.0",
    }
    with pytest.raises(ValueError, match="zip"):
        printed(columns("bbox", AP), "29.2 49.5")


def test_columns_have_headings_of_their_kind():
    assert columns("bbox", AP[:2]) == {"bbox/AP": "box AP", "bbox/AP50": "box AP50"}


def test_a_pair_of_rows_is_compared_in_every_column():
    claims = higher("a", "b", columns("segm", AP[:2]), "steadily")
    assert claims == tuple(Claim(higher="a", lower="b", column=c, text="steadily") for c in ("segm/AP", "segm/AP50"))
