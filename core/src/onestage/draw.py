"""Pictures of instances and line charts, as pages show them.

A page is one self-contained HTML file: pictures are inside it as data, charts are SVG that its template draws.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

SHOWN_WIDTH = 420  # px of a picture in the file; screens show about 260
HIGHEST = 4  # times its width, a picture
CLASS_COLOURS = ((42, 120, 214), (235, 104, 52), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
DASH = 6  # px, and as much between two
BEFORE_COLOUR, AFTER_COLOUR = (255, 255, 255), (20, 20, 20)  # boxes before and after refinement
CHART = (440.0, 250.0, 52.0, 14.0, 12.0, 30.0)  # width, height; margins left, right, top, bottom


@dataclass(frozen=True)
class Instances:
    """What one picture shows, N instances.

    Args:
        boxes: [N, 4] float xyxy, image pixels.
        labels: [N] int64, 0..K-1.
        masks: [N, H, W] bool, or None where only boxes are known; then these are drawn.
        scores: [N] float in 0..1, or None for ground truth.
        unrefined_boxes: [N, 4] where a method moved boxes; then both are drawn.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    scores: Tensor | None = None
    unrefined_boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Line:
    """One curve: its name and (x, y) points; places in the chart come from `chart`."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(
    image: Tensor, instances: Instances, names: Sequence[str], *, width: int = SHOWN_WIDTH, boxes: bool = False
) -> Image.Image:
    """The image, enlarged, with every instance filled, outlined and (with scores) labelled.

    Args:
        image: [3, H, W] uint8 RGB.
        instances: N instances in its pixels.
        names: Category name of each label.
        width: Of the picture, px; less for an image more than HIGHEST times as high as wide.
        boxes: Draw boxes as well, each in its category's colour.
    """
    factor = min(width / image.shape[-1], HIGHEST * width / image.shape[-2])
    size = (max(1, round(image.shape[-2] * factor)), max(1, round(image.shape[-1] * factor)))
    canvas = F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0].clamp(0, 255)
    masks = () if instances.masks is None else instances.masks
    for index in reversed(range(len(masks))):  # the best one last, on top
        colour = torch.tensor(colour_of(int(instances.labels[index])), dtype=torch.float32)[:, None, None]
        soft = F.interpolate(masks[index][None, None].float(), size=size, mode="bilinear", align_corners=False)
        inside = soft[0] > 0.5  # [1, h, w]
        grown = F.max_pool2d(inside.float(), 5, stride=1, padding=2) > 0
        grey = canvas.mean(dim=0, keepdim=True)  # the object's own colour would hide the category's
        canvas = torch.where(inside, grey * 0.4 + colour * 0.6, canvas)
        canvas = torch.where(grown & ~inside, torch.full_like(canvas, 255.0), canvas)
    picture = Image.fromarray(canvas.round().to(torch.uint8).permute(1, 2, 0).numpy())
    if instances.unrefined_boxes is not None:
        _draw_boxes(picture, instances, factor)
    elif boxes or instances.masks is None:
        pen = ImageDraw.Draw(picture)
        for box, label in zip((instances.boxes * factor).tolist(), instances.labels.tolist(), strict=True):
            pen.rectangle(tuple(box), outline=colour_of(label), width=2)
    if instances.scores is not None:
        _write_scores(picture, instances, names, factor)
    return picture


def chart(title: str, x_name: str, lines: Sequence[Line], *, y_max: float | None = None) -> dict[str, Any]:
    """A line chart as the template draws it: axis ticks and polylines in the pixels of its viewBox.

    Args:
        title: What the vertical axis shows.
        x_name: What the horizontal axis counts.
        lines: At most six curves; those without points, and values that are not finite, are left out. The others keep
            the colours of their places.
        y_max: Top of the axis; otherwise a round number above the largest value.
    """
    width, height, left, right, top, bottom = CHART
    finite = [Line(line.name, [point for point in line.points if math.isfinite(point[1])]) for line in lines]
    drawn = [(colour, line) for colour, line in enumerate(finite) if line.points]
    xs = [x for _, line in drawn for x, _ in line.points] or [0.0, 1.0]
    ys = [y for _, line in drawn for _, y in line.points] or [0.0, 1.0]
    x_ticks, y_ticks = _ticks(max(*xs, 1e-9)), _ticks(y_max or max(*ys, 1e-9))
    x_end, y_end = max(xs) or 1.0, max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + (width - left - right) * x / x_end, 1),
            round(height - bottom - (height - top - bottom) * max(y, 0.0) / y_end, 1),
        )

    return {
        "title": title,
        "x_name": x_name,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "bottom": height - bottom,
        "x_ticks": [(place(x, 0)[0], f"{x:g}") for x in x_ticks if x <= x_end],
        "y_ticks": [(place(0, y)[1], f"{y:g}") for y in y_ticks],
        "lines": [
            {
                "name": line.name,
                "colour": colour,
                "points": " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points)),
                "dots": [place(*point) for point in line.points] if len(line.points) <= 12 else [],
                "last": f"{line.points[-1][1]:.3g}",
            }
            for colour, line in drawn
        ],
    }


def data_uri(picture: Image.Image) -> str:
    """The picture as JPEG in a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def colour_of(label: int) -> tuple[int, int, int]:
    """RGB of a category."""
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def template(package: str, name: str) -> jinja2.Template:
    """A page's template of `package`/templates; it may include the shared `style.css` and `charts.html`."""
    loaders = [jinja2.PackageLoader(package, "templates"), jinja2.PackageLoader("onestage", "templates")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _draw_boxes(picture: Image.Image, instances: Instances, factor: float) -> None:
    """Boxes before (dashed) and after (whole) they were refined."""
    assert instances.unrefined_boxes is not None
    pen = ImageDraw.Draw(picture)
    for before, after in zip(instances.unrefined_boxes * factor, instances.boxes * factor, strict=True):
        x0, y0, x1, y1 = before.tolist()
        for start in range(int(x0), int(x1), 2 * DASH):
            for y in (y0, y1):
                pen.line((start, y, min(start + DASH, x1), y), fill=BEFORE_COLOUR, width=2)
        for start in range(int(y0), int(y1), 2 * DASH):
            for x in (x0, x1):
                pen.line((x, start, x, min(start + DASH, y1)), fill=BEFORE_COLOUR, width=2)
        pen.rectangle(tuple(after.tolist()), outline=AFTER_COLOUR, width=2)


def _write_scores(picture: Image.Image, instances: Instances, names: Sequence[str], factor: float) -> None:
    assert instances.scores is not None
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(11, min(17, picture.width // 20)))
    for index in reversed(range(len(instances))):
        text = f"{names[int(instances.labels[index])]} {float(instances.scores[index]):.2f}"
        x, y = (float(value) * factor for value in instances.boxes[index, :2])
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(x, 0.0), picture.width - (right - left) - 6)
        y = min(max(y - (bottom - top) - 6, 0.0), picture.height - (bottom - top) - 6)
        colour = tuple(int(channel * 0.75) for channel in colour_of(int(instances.labels[index])))
        pen.rectangle((x, y, x + right - left + 6, y + bottom - top + 6), fill=colour)
        pen.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)


def _ticks(end: float) -> list[float]:
    """Four to six round numbers from 0 to at least `end`."""
    rough = end / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [round(step * k, 10) for k in range(math.ceil(end / step * 0.999) + 1)]
