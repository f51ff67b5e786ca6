import importlib.util
from dataclasses import replace
from pathlib import Path

from onestage.config import InputConfig
from onestage.tables.spec import Claim, Row, Table

# The path, because the tests are no package.
_spec = importlib.util.spec_from_file_location("toy_of_cli", Path(__file__).parents[2] / "cli" / "conftest.py")
_cli = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cli)

BIG, ToyConfig = _cli.BIG, _cli.ToyConfig


def measured(config, train_set, val_set):
    return {"error": 0.5 / config.grid[0], "images": float(len(val_set))}


TABLES = (
    Table(
        number="2a",
        caption="Sub-regions",
        columns={"segm/AP": "mask AP", "bbox/AP": "box AP"},
        split="val2017",
        rows=(
            Row(name="1x1", paper={"segm/AP": "31.2"}, config=replace(BIG, grid=(1, 1))),
            Row(name="2x2", paper={"segm/AP": "32.9", "bbox/AP": "40.0"}, config=BIG, notes=("a note",)),
            Row(
                name="2x2 strict",
                paper={"segm/AP": "30.0"},
                config=replace(BIG, inference=replace(BIG.inference, score_threshold=0.99)),
            ),
            Row(name="2x2 large", paper={}, config=replace(BIG, backbone=replace(BIG.backbone, name="resnet101"))),
            Row(name="Other", paper={"segm/AP": "28.0"}, why_not="cited: another system"),
        ),
        claims=(Claim(higher="2x2", lower="1x1", column="segm/AP", text="a gain of 1.7 (Sec. 4)"),),
    ),
    Table(
        number="2b",
        caption="Code",
        columns={"error": "error, %"},
        split="val2017",
        rows=(
            Row(name="coarse", paper={"error": "5.0"}, config=replace(BIG, grid=(1, 1)), measure=measured),
            Row(name="fine", paper={"error": "2.5"}, config=replace(BIG, grid=(10, 1)), measure=measured),
        ),
        claims=(Claim(higher="coarse", lower="fine", column="error"),),
    ),
    Table(number="figure5", caption="Nothing to run", columns={"x": "x"}, split="val2017", rows=()),
)
INPUT = InputConfig(resize="fixed", test_size=(128, 128), train_sizes=((128, 128),))
VARIANTS = {**_cli.METHOD.variants, "demo": replace(_cli.DEMO, input=INPUT)}
METHOD = replace(_cli.METHOD, name="toy", variants=VARIANTS, tables=lambda: TABLES)
