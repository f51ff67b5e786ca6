"""The tables as data: the paper's text has the same numbers, claims follow from them, every row builds its model."""

import pytest

from onestage.tables.spec import AP, AR, columns
from onestage.testing import check_claims, check_printed, check_rows
from sprnet.method import METHOD

SEGM = columns("segm", AP)
BBOX = columns("bbox", AP)
SEGM_AR = columns("segm", AR)
BBOX_AR = columns("bbox", AR)
# Table: the line above its first one, what its last cells are.
PRINTED = {
    "1": ("fps\tscale\tbackbone", ("fps", "", "", *SEGM)),
    "2a": ("(a) Fusion Paths", SEGM),
    "2b": (
        "(b) FPN vs. GFPN",
        (*((0, column) for column in columns("segm", AP[:3])), *((1, column) for column in columns("bbox", AP[:3]))),
    ),
    "2c": ("(c) Mask Generation", SEGM),
    "2d": ("(d) Mask IoU", SEGM),
    "3": ("backbone\t$AR_1^{box}$", BBOX_AR),
    "4": ("backbone\t$AR_1^{seg}$", SEGM_AR),
    "5": ("\tbackbone\t$AP^{bb}$", BBOX),
    "6": ("scale\tGFPN?", BBOX),
}


def test_every_table_and_figure_with_numbers_is_there():
    assert [table.number for table in METHOD.tables()] == ["1", "2a", "2b", "2c", "2d", "3", "4", "5", "6"]


@pytest.mark.parametrize("number", PRINTED)
def test_numbers_are_those_of_the_paper(number, paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == number)
    start, cells, *options = PRINTED[number]
    check_printed(table, paper_text, start=start, columns=tuple(cells), **(options[0] if options else {}))


def test_claims_follow_from_the_printed_numbers():
    check_claims(METHOD.tables())


def test_every_row_builds_its_model():
    check_rows(METHOD)
