import re

import pytest
import torch

from onestage.cli.page import Example, points_of, render
from onestage.draw import Instances, Line, chart, data_uri, draw


def square(scores: bool) -> Instances:
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 8:24, 8:24] = True
    return Instances(
        torch.tensor([[8.0, 8, 24, 24]]), torch.tensor([0]), mask, torch.tensor([0.87]) if scores else None
    )


def page(**changes):
    image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    values = {
        "title": "Toy on generated shapes",
        "lead": "A lead.",
        "label": "generated shapes, not COCO",
        "numbers": [("mask AP", "52.1")],
        "names": ["ring"],
        "examples": [Example(image, square(False), square(True))],
        "charts": [chart("Loss", "steps", [Line("total", [(10, 4.0), (20, 2.0)])])],
        "metrics": {"segm/AP": 0.5212, "bbox/AP": 0.6, "segm/APl": -1.0, "segm/AP/ring": 0.5, "bbox/AP/ring": 0.25},
        "commands": [("look", "python -m toy.info x")],
        "config": {"grid": (2, 2), "backbone": {"name": "resnet18"}},
        "environment": {"python": "3.11"},
    }
    return render(**(values | changes))


def test_the_page_needs_nothing_but_itself():
    html = page()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 2  # truth and prediction
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html


def test_the_page_says_what_the_data_are_and_what_came_out():
    html = page()
    assert html.count("generated shapes, not COCO") == 3
    assert "52.1" in html
    assert re.search(r"<td>ring</td><td>25.0</td><td>50.0</td>", html)
    assert "backbone.name" in html
    assert "python -m toy.info x" in html


def test_a_metric_that_has_no_objects_is_a_dash():
    row = re.search(r"AP large.*?</tr>", page(), re.S).group()
    assert re.findall(r"<td>([^<]*)</td>", row) == ["-", "-"]


def test_names_from_a_data_set_cannot_become_markup():
    html = page(names=["<script>alert(1)</script>"], metrics={"segm/AP/<script>alert(1)</script>": 0.1})
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_chart_places_points_by_hand():
    made = chart("Loss", "steps", [Line("total", [(0, 0.0), (100, 5.0)]), Line("nothing", [])])
    assert [text for _, text in made["y_ticks"]] == ["0", "1", "2", "3", "4", "5"]
    assert len(made["lines"]) == 1
    again = chart("Loss", "steps", [Line("nothing", []), Line("total", [(0, 1.0)])])
    assert [(line["name"], line["colour"]) for line in again["lines"]] == [("total", 1)]
    assert made["lines"][0]["points"] == f"{made['left']},{made['bottom']} {made['right']},12.0"


def test_a_long_run_is_drawn_as_means_of_neighbours():
    rows = [{"step": step, "loss": float(step % 2)} for step in range(1, 1001)]
    points = points_of(rows, "loss")
    assert len(points) == 334
    assert points[0] == (2, pytest.approx(2 / 3))
    assert points_of(rows[:3], "loss") == [(1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("values", [[], [0.0], [1e-6, 2e-6], [1e9], [float("nan"), 1.0]])
def test_a_chart_of_any_values_can_be_drawn(values):
    assert chart("x", "steps", [Line("a", [(k, v) for k, v in enumerate(values)])])["y_ticks"]


def test_a_picture_shows_the_instance_in_its_categorys_colour():
    image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    picture = draw(image, square(False), ["ring"])
    red, _, blue = picture.getpixel((picture.width // 2, picture.height // 2))
    assert blue > red + 50
    assert picture.getpixel((2, 2)) == (90, 90, 90)
    assert draw(image, square(True), ["ring"]).tobytes() != picture.tobytes()  # the score is written


def test_a_picture_of_a_line_fits_into_a_jpeg():
    line = Instances(torch.tensor([[0.0, 0, 2, 9]]), torch.tensor([0]), torch.ones(1, 2000, 10), torch.tensor([0.5]))
    picture = draw(torch.zeros(3, 2000, 10, dtype=torch.uint8), line, ["ring"])
    assert picture.size == (8, 1680)
    assert data_uri(picture)
