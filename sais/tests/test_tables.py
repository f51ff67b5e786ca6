"""The tables as data: the paper's text has the same numbers, claims follow from them, every row builds its model."""

from dataclasses import replace

import pytest

from onestage.tables.spec import AP, columns
from onestage.testing import check_claims, check_printed, check_rows
from sais.method import METHOD

SEGM = columns("segm", AP)
# Table: the line above its first one, what its last cells are.
PRINTED = {
    "1": ("input\tsize", ("bbox/AP", "segm/AP")),
    "3": ("Fusion\t", SEGM),
    "4": ("Method\tBackbone\tepochs", (*SEGM, "fps", "memory", "")),
}


def test_every_table_and_figure_with_numbers_is_there():
    assert [table.number for table in METHOD.tables()] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("number", PRINTED)
def test_numbers_are_those_of_the_paper(number, paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == number)
    start, cells, *options = PRINTED[number]
    check_printed(table, paper_text, start=start, columns=tuple(cells), **(options[0] if options else {}))


def test_table_two_has_boxes_of_one_model_and_masks_of_another(paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == "2")
    as_printed = [
        replace(row, paper={column.split("/")[1]: number for column, number in row.paper.items()}) for row in table.rows
    ]
    table = replace(table, columns={name: name for name in AP}, rows=tuple(as_printed), claims=())
    check_printed(table, paper_text, start="Method\tw/ c", columns=AP)


def test_claims_follow_from_the_printed_numbers():
    check_claims(METHOD.tables())


def test_every_row_builds_its_model():
    check_rows(METHOD)
