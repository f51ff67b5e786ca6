"""The tables as data: the paper's text has the same numbers, claims follow from them, every row builds its model."""

from dataclasses import replace

import pytest

from onestage.tables.spec import AP, columns
from onestage.testing import check_claims, check_printed, check_rows
from rdsnet.config import R101
from rdsnet.method import METHOD

SEGM = columns("segm", AP)
BBOX = columns("bbox", AP)
# Table: the line above its first one, what its last cells are.
PRINTED = {
    "1": ("Method\tScale\tepoch", ("fps", *SEGM)),
    "2": ("Method\t\tScale", ("fps", *BBOX)),
    "3": ("No.\t", ("fps", "segm/AP"), {"blank": ("fps",)}),
    "4": ("Method\tAP^{bb}\t", columns("bbox", ("AP", "APs", "APm", "APl"))),
}


def test_every_table_and_figure_with_numbers_is_there():
    assert [table.number for table in METHOD.tables()] == ["1", "2", "3", "4", "figure5"]


@pytest.mark.parametrize("number", PRINTED)
def test_numbers_are_those_of_the_paper(number, paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == number)
    start, cells, *options = PRINTED[number]
    check_printed(table, paper_text, start=start, columns=tuple(cells), **(options[0] if options else {}))


def test_figure_5_repeats_the_numbers_of_table_4():
    table, figure = (next(t for t in METHOD.tables() if t.number == number) for number in ("4", "figure5"))
    for ours, theirs in (("gamma 0", "baseline"), ("s 4, gamma 0.05", "MBRM")):
        assert figure.row(ours).paper["bbox/AP"] == table.row(theirs).paper["bbox/AP"]
        assert figure.row(ours).config == table.row(theirs).config


def test_rows_of_table_3_are_four_trainings():
    (table,) = (table for table in METHOD.tables() if table.number == "3")
    assert len({replace(row.config, inference=R101.inference) for row in table.rows}) == 4


def test_claims_follow_from_the_printed_numbers():
    check_claims(METHOD.tables())


def test_every_row_builds_its_model():
    check_rows(METHOD)
