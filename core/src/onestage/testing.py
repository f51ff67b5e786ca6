"""Oracles and inputs for tests and benchmarks: the published dense formulas, written once, typical boxes, and what a
paper's tables are checked with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.method import Method
from onestage.tables.spec import Table, small_config

Size = tuple[int, int]


def coco_like_boxes(count: int, size: Size, generator: torch.Generator | None = None) -> Tensor:
    """Boxes as COCO has them: 40 % small, 35 % medium, 25 % large; 100 of them cover an image about 8.5 times.

    Args:
        count: N.
        size: (height, width) of the image, pixels.

    Returns:
        [N, 4] float32 xyxy, image pixels, inside the image, at least 4 pixels wide and high, in random order.
    """
    height, width = size
    share = torch.linspace(0.0, 1.0, count) if count > 1 else torch.ones(count)
    draw = torch.rand(5, count, generator=generator)
    root = (height * width) ** 0.5
    # Sides as fractions of the image's mean side; 32 and 96 pixels in a photograph of 640 x 480 are 0.058 and 0.173.
    low = torch.where(share < 0.4, 0.016, torch.where(share < 0.75, 0.058, 0.173))
    high = torch.where(share < 0.4, 0.058, torch.where(share < 0.75, 0.173, 0.9))
    side = low + (high - low) * draw[0]
    aspect = (2.0 * draw[1] - 1.0).exp2().sqrt()
    sides = torch.stack((side * aspect, side / aspect), 1) * root
    limits = torch.tensor([width, height], dtype=torch.float32)
    sides = torch.minimum(sides.clamp(min=4.0), limits)
    corner = draw[2:4].T * (limits - sides)
    boxes = torch.cat((corner, corner + sides), 1)
    return boxes[torch.rand(count, generator=generator).argsort()]


def dense_soft_masks(
    basis: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    *,
    grid: Size = (1, 1),
    upsample: int = 1,
    rule: str = "half_open",
) -> Tensor:
    """Cropped probabilities as published: all sub-region maps dense, then one chosen at every pixel. Differentiable.

    Args:
        basis: [D, h, w].
        coefficients: [N, rows * columns * D].
        boxes: [N, 4] xyxy, cells of the upsampled basis grid.
        grid: (rows, columns) of sub-regions (SipMask Sec. 3.2.1).
        upsample: Factor by which the basis is upsampled first, bilinear.
        rule: "half_open" (SipMask), "margin" (YOLACT: ends put in order, one cell more on each side).

    Returns:
        [N, h * upsample, w * upsample] in the inputs' type.
    """
    if upsample > 1:
        basis = F.interpolate(basis[None], scale_factor=upsample, mode="bilinear", align_corners=False)[0]
    rows, columns = grid
    num_maps = rows * columns
    weights = coefficients.view(len(coefficients), num_maps, len(basis))
    maps = [torch.einsum("nd,dhw->nhw", weights[:, k], basis).sigmoid() for k in range(num_maps)]
    y = torch.arange(basis.shape[1], device=basis.device)[None, :, None]
    x = torch.arange(basis.shape[2], device=basis.device)[None, None, :]
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    if rule == "margin":
        x1, x2 = torch.minimum(x1, x2), torch.maximum(x1, x2)
        y1, y2 = torch.minimum(y1, y2), torch.maximum(y1, y2)
        inside = (x >= x1 - 1) & (x < x2 + 1) & (y >= y1 - 1) & (y < y2 + 1)
    else:
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    cell_width = (((x2 - x1).double() + 0.1) / columns).to(boxes.dtype)
    cell_height = (((y2 - y1).double() + 0.1) / rows).to(boxes.dtype)
    region = ((y - y1) / cell_height).floor() * columns + ((x - x1) / cell_width).floor()
    soft = torch.zeros_like(maps[0])
    for k, values in enumerate(maps):
        soft = torch.where(inside & (region == k), values, soft) if num_maps > 1 else values * inside
    return soft


def dense_masks(soft: Tensor, threshold: float, resized_size: Size, output_size: Size) -> Tensor:
    """Binary masks as published for order "prob": resize probabilities, compare, copy the overlap.

    Args:
        soft: [N, h, w] cropped probabilities.
        threshold: Probability.
        resized_size: (height, width) of the resized canvas.
        output_size: (height, width) of the image.

    Returns:
        [N, *output_size] bool.
    """
    resized = F.interpolate(soft[None], size=resized_size, mode="bilinear", align_corners=False)[0] > threshold
    height, width = min(resized_size[0], output_size[0]), min(resized_size[1], output_size[1])
    masks = resized.new_zeros(len(soft), *output_size)
    masks[:, :height, :width] = resized[:, :height, :width]
    return masks


def dense_two_class_masks(
    basis: Tensor,
    background: Tensor,
    foreground: Tensor,
    windows: Tensor,
    *,
    padded_size: Size,
    resized_size: Size,
    output_size: Size,
) -> Tensor:
    """Foreground probabilities as published for order "logits" (RDSNet): two maps each, two resizes, softmax, crop.

    Args:
        basis: [D, h, w].
        background: [N, D] coefficients.
        foreground: [N, D] coefficients.
        windows: [N, 4] int64 x0, y0, x1, y1, half-open, output pixels.
        padded_size: (height, width) of the first resize, corners not aligned.
        resized_size: (height, width) of it that is kept.
        output_size: (height, width) of the second resize, corners aligned.

    Returns:
        [N, *output_size] float in [0, 1], 0 outside the windows.
    """
    logits = torch.einsum("knd,dhw->nkhw", torch.stack((background, foreground)), basis)
    logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
    logits = logits[:, :, : resized_size[0], : resized_size[1]]
    logits = F.interpolate(logits, size=output_size, mode="bilinear", align_corners=True)
    soft = logits.softmax(1)[:, 1]
    y = torch.arange(output_size[0], device=basis.device)[None, :, None]
    x = torch.arange(output_size[1], device=basis.device)[None, None, :]
    x0, y0, x1, y1 = windows[:, :, None, None].unbind(1)
    return soft * ((x >= x0) & (x < x1) & (y >= y0) & (y < y1))


def dense_paste(probabilities: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Square maps sampled at every pixel of the image (MEInst, Mask R-CNN), one dense `grid_sample`.

    Args:
        probabilities: [N, M, M].
        boxes: [N, 4] xyxy, image pixels.
        size: (height, width) of the image.

    Returns:
        [N, height, width] float in [0, 1].
    """
    height, width = size
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    points = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1)
    return F.grid_sample(probabilities[:, None], points, align_corners=False)[:, 0]


def dense_mask_loss(
    basis: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    masks: Tensor,
    mask_index: Tensor,
    *,
    grid: Size = (1, 1),
    rule: str = "half_open",
) -> Tensor:
    """Sum of binary cross-entropy inside each box as published: on dense cropped probabilities. Differentiable.

    Args:
        basis: [D, h, w].
        coefficients: [N, rows * columns * D].
        boxes: [N, 4] xyxy, basis cells.
        masks: [G, h, w] of 0 and 1.
        mask_index: [N] int64, the mask each box answers for.
        grid: (rows, columns) of sub-regions.
        rule: Which cells belong to a box, as in `dense_soft_masks`.

    Returns:
        [N].
    """
    ones = torch.zeros(len(coefficients), coefficients.shape[1], dtype=basis.dtype, device=basis.device)
    inside = dense_soft_masks(basis.detach() * 0, ones, boxes, grid=grid, rule=rule) > 0
    soft = dense_soft_masks(basis, coefficients, boxes, grid=grid, rule=rule)
    wanted = masks[mask_index].to(soft.dtype) * inside
    return F.binary_cross_entropy(soft, wanted, reduction="none").sum((1, 2))


def check_printed(
    table: Table,
    text: str,
    *,
    start: str,
    columns: Sequence[str | tuple[int, str]] | Mapping[str, str],
    repairs: Mapping[str, str] | None = None,
    blank: Sequence[str] = (),
) -> None:
    """Every number of a table against the text of its paper, cell by cell in the printed order.

    The rows with numbers must be the printed lines, one for one, and the words of a row's `source` ("Table 1: words")
    must stand in its line. A missing, mistyped or transposed number is an AssertionError that names row and column.

    Args:
        table: The table as data.
        text: The paper; cells are separated by tabs, bold ones may be marked up.
        start: Some words of the line above the table's first one, once in the text. An empty line ends the table.
        columns: The columns of the last cells of a line. "" is a cell without a number to check; (k, column) is a
            cell that belongs to the k-th of several rows that share the line.
        repairs: Printed cells, where the text has run two together, and what they are.
        blank: Columns whose cell may be empty, because the paper prints it once for several lines.
    """
    assert text.count(start) == 1, f"{table.title}: {start!r} stands {text.count(start)} times in the text"
    body = text.split(start)[1].partition("\n")[2].lstrip("\n").partition("\n\n")[0]
    cells = [(0, entry) if isinstance(entry, str) else entry for entry in columns]
    rows = [row for row in table.rows if row.paper]
    together = 1 + max(k for k, _ in cells)
    position = 0
    for line in body.splitlines():
        words = line.split("\t")
        printed = [_number((repairs or {}).get(word, word)) for word in words[len(words) - len(cells) :]]
        checked = [(k, column, word) for (k, column), word in zip(cells, printed, strict=True) if column]
        if not any(word == "-" or word[:1].isdigit() for _, _, word in checked):
            continue  # a heading
        assert position + together <= len(rows), f"{table.title}: no row for the line {line!r}"
        for k, column, word in checked:
            row = rows[position + k]
            if word or column not in blank:
                ours = row.paper.get(column, "-")
                assert ours == word, f"{table.title}, row '{row.name}', {column}: {ours} here, {word!r} in {line!r}"
        for row in rows[position : position + together]:
            for word in row.source.partition(": ")[2].partition(";")[0].split():
                assert word in line, f"{table.title}, row '{row.name}': {word!r} of its source is not in {line!r}"
        position += together
    assert position == len(rows), f"{table.title}: no line for row '{rows[position].name}'"


def check_claims(tables: Sequence[Table]) -> None:
    """Claims agree with the paper's own numbers, where it prints both; a claim stands once."""
    for table in tables:
        assert len(set(table.claims)) == len(table.claims), f"{table.title}: a claim stands twice"
        for claim in table.claims:
            more, less = (table.row(name).paper.get(claim.column) for name in (claim.higher, claim.lower))
            if more is not None and less is not None:
                assert float(more) > float(less), f"{table.title}: the paper's numbers contradict {claim}"


def check_rows(method: Method) -> None:
    """Every row's configuration, at its size and for generated shapes, builds its model, on the meta device.

    Full-size models that differ only in what training does not read (`Method.after_training`) are built once.
    """
    usual, demo = method.variants[method.default_variant], method.variants[method.demo_variant]
    same = {name: getattr(usual, name) for name in ("schedule", "input", *method.after_training)}
    networks = set()
    for table in method.tables():
        for row in table.rows:
            assert row.paper.keys() <= table.columns.keys()
            assert row.source or not row.paper, f"{table.title}, row '{row.name}': where does the paper say so?"
            if row.config is not None:
                networks |= {replace(row.config, **same), small_config(row, usual, demo)}
    for config in networks:
        with torch.device("meta"):
            method.build(config)


def _number(cell: str) -> str:
    """What is printed in a cell, without mark-up, differences to other rows, and the letter of a GPU."""
    cell = re.sub(r"</?b>|\$|\*\*", "", cell)
    cell = re.sub(r"\s*(\^\{[^}]*\}|\([+-][^)]*\)|/[VP])", "", cell).strip()
    return "-" if cell in ("_", "\u2014") else cell
