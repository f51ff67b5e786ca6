"""The tables as data: the paper's text has the same numbers, claims follow from them, every row builds its model."""

import pytest

from onestage.tables.spec import AP, columns
from onestage.testing import check_claims, check_printed, check_rows
from sipmask.method import METHOD

SEGM = columns("segm", AP)
# Table: the line above its first one, what its last cells are.
PRINTED = {
    "1": ("Method\tBackbone\tInput Size", ("ms", *SEGM)),
    "4": ("$1 \\times 1$\t", [(k, "segm/AP") for k in range(6)]),
    "5": ("baseline\tonly cls.", [(k, "segm/AP") for k in range(4)]),
    "6": ("method\tcategory", columns("vis", ("AP", "AP50", "AP75", "AR1", "AR10"))),
}


def test_every_table_and_figure_with_numbers_is_there():
    assert [table.number for table in METHOD.tables()] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("number", PRINTED)
def test_numbers_are_those_of_the_paper(number, paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == number)
    start, cells, *options = PRINTED[number]
    check_printed(table, paper_text, start=start, columns=tuple(cells), **(options[0] if options else {}))


def test_tables_that_the_text_lacks_repeat_numbers_of_others(paper_text):
    tables = {table.number: table for table in METHOD.tables()}
    assert "The baseline achieves a mask AP of 31.2." in paper_text
    assert tables["2"].row("baseline").paper == tables["3"].row("baseline").paper == {"segm/AP": "31.2"}
    for ours, number, theirs in (("sub-regions", "4", "2x2"), ("WL", "5", "cls.+loc.")):
        ours, theirs = tables["3"].row(ours), tables[number].row(theirs)
        assert (ours.paper, ours.config) == (theirs.paper, theirs.config)
    assert sum(len(row.paper) for number in "23" for row in tables[number].rows) == 4


def test_speed_of_videos_is_that_of_the_text(paper_text):
    (table,) = (table for table in METHOD.tables() if table.number == "6")
    row = table.row("SipMask")
    assert f"real-time ({row.paper['fps']} fps) on a {row.hardware}" in paper_text


def test_claims_follow_from_the_printed_numbers():
    check_claims(METHOD.tables())


def test_every_row_builds_its_model():
    check_rows(METHOD)
