"""The tables as data: the paper's text has the same numbers, claims follow from them, every row builds its model."""

import pytest

from meinst.method import METHOD
from onestage.data.synth import ShapesDataset
from onestage.tables.spec import AP, columns
from onestage.testing import check_claims, check_printed, check_rows

SEGM = columns("segm", AP)
BBOX = columns("bbox", AP)
# Table: the line above its first one, what its last cells are.
PRINTED = {
    "1": ("Detector\tAP", ("segm/AP", *BBOX)),
    "2": ("N\tAP", SEGM),
    "3": ("encoding\t", SEGM, {"repairs": {"<b>32.9</b> 31.6": "31.6"}}),
    "4": ("loss\t", SEGM),
    "5": ("larger?\t", SEGM, {"repairs": {"31.1 31.9 <b>32.9</b>": "32.9"}}),
    "6": ("w/mask\t", BBOX, {"repairs": {"58.2 <b>58.5</b>": "58.2"}}),
    "7": ("Scale\tMethod", (*columns("segm", AP[:3]), "fps")),
    "8": ("Method\tBackbone\tepochs", SEGM),
}


def test_every_table_and_figure_with_numbers_is_there():
    assert [table.number for table in METHOD.tables()] == ["1", "2", "3", "4", "5", "6", "7", "8", "figure4", "figure5"]


@pytest.mark.parametrize("number", PRINTED)
def test_numbers_are_those_of_the_paper(number, paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == number)
    start, cells, *options = PRINTED[number]
    check_printed(table, paper_text, start=start, columns=tuple(cells), **(options[0] if options else {}))


def test_the_one_number_of_figure_5_is_that_of_the_text(paper_text):
    (figure,) = (table for table in METHOD.tables() if table.number == "figure5")
    (row,) = (row for row in figure.rows if row.paper)
    assert f"when the dimension goes to {row.name} (only {row.paper['error']}%)" in paper_text


def test_figure_5_measures_less_error_with_longer_codes():
    (figure,) = (table for table in METHOD.tables() if table.number == "figure5")
    shapes = ShapesDataset(40, split="train", seed=0)
    errors = []
    for name in ("20", "40", "60"):
        row = figure.row(name)
        errors.append(row.measure(row.config, shapes, shapes)["error"])
    assert 0.2 > errors[0] > errors[1] > errors[2] > 0.0


def test_claims_follow_from_the_printed_numbers():
    check_claims(METHOD.tables())


def test_every_row_builds_its_model():
    check_rows(METHOD)
