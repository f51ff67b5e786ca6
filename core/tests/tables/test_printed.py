"""What checks a table against its paper's text must itself notice every kind of slip."""

from dataclasses import replace

import pytest

from onestage.tables.spec import Claim, Row, Table
from onestage.testing import check_claims, check_printed

TEXT = """Above.

\tepochs\tAP\tAP50\tms
<b>Two-stage</b>\t\t\t\t
Other [3]\t12\t29.2\t-\t5 /V
Ours\t36\t**30.4**(+1.2)\t$53.2^{+1.1}$\t<b>7</b>

Table 1: below, 99.9.
"""
COLUMNS = {"segm/AP": "", "segm/AP50": "", "ms": ""}
OTHER = Row(name="other", source="Table 1: Other 12", paper={"segm/AP": "29.2", "ms": "5"}, why_not="cited")
OURS = Row(name="ours", source="Table 1: Ours 36", paper={"segm/AP": "30.4", "segm/AP50": "53.2", "ms": "7"}, config=1)
EXTRA = Row(name="extra", paper={}, config=2)
TABLE = Table(number="1", caption="", columns=COLUMNS, split="", rows=(OTHER, OURS, EXTRA))


def check(*rows, text=TEXT, columns=tuple(COLUMNS)):
    check_printed(replace(TABLE, rows=rows), text, start="epochs\tAP", columns=columns)


def with_paper(row, **numbers):
    return replace(row, paper={**row.paper, **{f"segm/{key}": number for key, number in numbers.items()}})


def test_the_printed_numbers_pass():
    check(OTHER, OURS, EXTRA)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((OTHER, with_paper(OURS, AP="30.3")), "30.3 here, '30.4'"),
        ((OTHER, with_paper(OURS, AP="53.2", AP50="30.4")), "53.2 here, '30.4'"),
        ((with_paper(OTHER, AP50="49.5"), OURS), "49.5 here, '-'"),
        ((OTHER, replace(OURS, paper={"segm/AP": "30.4", "ms": "7"})), "- here, '53.2'"),
        ((OURS, OTHER), "row 'ours'"),
        ((OTHER,), "no row for the line"),
        ((OTHER, OURS, with_paper(EXTRA, AP="1.0")), "no line for row 'extra'"),
        ((OTHER, replace(OURS, source="Table 1: Ours 12")), "'12' of its source"),
    ],
)
def test_a_slip_is_named(rows, message):
    with pytest.raises(AssertionError, match=message):
        check(*rows)


def test_rows_may_share_a_line_and_cells_may_hold_two_numbers():
    pair = (
        Row(name="a", paper={"segm/AP": "1.0"}, config=1),
        Row(name="b", paper={"segm/AP": "2.0"}, config=2),
    )
    text = "epochs\tAP\nboth\t1.0\t1.0 2.0\n\n"
    arguments = {"start": "epochs", "columns": [(0, "segm/AP"), (1, "segm/AP")]}
    check_printed(replace(TABLE, rows=pair), text, **arguments, repairs={"1.0 2.0": "2.0"})
    with pytest.raises(AssertionError, match="row 'b'"):
        check_printed(replace(TABLE, rows=pair), text, **arguments)


def test_claims_may_not_contradict_the_numbers():
    better = Claim(higher="ours", lower="other", column="segm/AP")
    check_claims([replace(TABLE, claims=(better, Claim(higher="extra", lower="ours", column="segm/AP")))])
    with pytest.raises(AssertionError, match="contradict"):
        check_claims([replace(TABLE, claims=(Claim(higher="other", lower="ours", column="segm/AP"),))])
    with pytest.raises(AssertionError, match="twice"):
        check_claims([replace(TABLE, claims=(better, better))])
