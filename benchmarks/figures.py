"""Sheets after the papers' drawings, on generated images: `python benchmarks/figures.py`, or `nox -s figures`.

Drawn from definitions alone, without training: MEInst's figures 1 and 3, SAIS' figure 2, SPRNet's figure 4. Drawn from
the trainings that the small tables leave in `--tables`, or named as missing with the command that makes them: figures 4
and 6 of SipMask, 1 and 4 of RDSNet. Writes one page.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from representations import Truth, representations
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import meinst.method
import rdsnet.method
import sais.method
import sipmask.method
import sprnet.method
from meinst.codec import MaskCodec
from meinst.fit import dataset_masks, fit
from onestage.data.synth import ShapesDataset
from onestage.draw import SHOWN_WIDTH, Instances, colour_of, data_uri, draw, template
from onestage.engine.checkpoint import load_into, load_weights
from onestage.files import write_atomically
from onestage.method import Method
from onestage.nn import fcos, retinanet
from onestage.ops.paste import cut_mask
from onestage.structures import ImageFrame, Target
from onestage.tables.plan import GENERATED, Settings, entry_of
from sais.model import RawOutput as SAISOutput
from sais.targets import assign_targets as sais_targets
from sprnet.model import RawOutput as SPRNetOutput
from sprnet.targets import ANCHORS_PER_PIXEL
from sprnet.targets import assign_targets as sprnet_targets

SIZE, NUM_IMAGES, FITTED_ON = 256, 3, 400  # px; images of a sheet; images that MEInst's codes are fitted on
CODE_LENGTHS = (20, 60, 100)
LEAST_SCORE = 0.3  # of what is shown of a network
GREEN, RED, BLUE = (40, 200, 80), (230, 50, 40), (60, 130, 255)
SIZES = [(SIZE // stride, SIZE // stride) for stride in fcos.STRIDES]
RULES = (("smallest box: area-aware", False), ("most central: centre-aware", True))
# Half of the example that sais/tests/test_targets.py works out: P4's locations see them as P5's see those.
TWO_BOXES = ((52.0, 45.0, 252.0, 195.0), (142.0, 50.0, 222.0, 190.0))
ONE_BOX = ((70.0, 72.0, 164.0, 160.0),)


@dataclass(frozen=True)
class Sheet:
    """One figure.

    Args:
        title: Which figure of which paper.
        text: What is to be seen.
        rows: Each an image's pictures with what is written under them.
        missing: What it takes to draw it, where it could not be.
    """

    title: str
    text: str
    rows: list[list[tuple[str, Image.Image]]] = field(default_factory=list)
    missing: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=Path("runs/tables/smoke"), help="what reproduce-tableN left")
    parser.add_argument("--output", type=Path, default=Path("runs/figures"))
    options = parser.parse_args()
    torch.manual_seed(0)
    images = ShapesDataset(NUM_IMAGES, split="val", size=SIZE, difficulty="hard")
    sheets = [
        *encodings(images),
        assignment(images),
        positive_pixels(images),
        *trained(
            options.tables,
            sipmask.method.METHOD,
            ("4", "1x1", "2x2"),
            "SipMask, figures 4 and 6: one set of coefficients against one for each of 2 x 2 sub-regions",
            "Two networks that differ in nothing else. Where objects touch, one set has to serve both sides of a box.",
        ),
        *trained(
            options.tables,
            rdsnet.method.METHOD,
            ("4", "baseline", "MBRM"),
            "RDSNet, figures 1 and 4: boxes before and after MBRM",
            "One network. Dashed: the box as regressed; whole: as read off its mask by MBRM.",
        ),
    ]
    page = options.output / "index.html"
    options.output.mkdir(parents=True, exist_ok=True)
    html = template("onestage.tables", "figures.html").render(
        label=GENERATED,
        sheets=[
            {
                "title": sheet.title,
                "text": sheet.text,
                "missing": sheet.missing,
                "rows": [[(name, data_uri(picture)) for name, picture in row] for row in sheet.rows],
            }
            for sheet in sheets
        ],
    )
    write_atomically(page, html.encode())
    for sheet in sheets:
        if sheet.missing:
            print(f"not drawn: {sheet.title}\n  {sheet.missing}", file=sys.stderr)
    print(f"page: {page.resolve()}")


def encodings(images: ShapesDataset) -> list[Sheet]:
    """MEInst's figures 1 (a contour against a code) and 3 (how a mask becomes a code)."""
    config = meinst.method.METHOD.variants["r50"]
    fitted = fit(dataset_masks(ShapesDataset(FITTED_ON, size=SIZE, difficulty="hard"), 28), CODE_LENGTHS, config)
    codecs = {}
    for length in CODE_LENGTHS:
        codecs[length] = MaskCodec(replace(config, code_length=length))
        codecs[length].load(fitted[length])
    shown = representations({"code of 60": codecs[60]})
    masks, pipeline = [], []
    for image, target in (images[i] for i in range(len(images))):
        size = (image.shape[1], image.shape[2])
        truth = Truth(target.image_id, size, target.boxes, target.labels, target.masks, (None,) * len(target))
        row = [("ground truth", draw(image, whole(target), []))]
        for name in ("one contour, 36 rays", "one contour, exact", "code of 60"):
            restored = shown[name](truth).to_bool()
            row.append((name, draw(image, Instances(target.boxes, target.labels, restored), [])))
        masks.append(row)
        pipeline.append(_pipeline(image, target, codecs))
    return [
        Sheet(
            "MEInst, figure 1: contours against codes",
            "A single contour loses holes and all parts but one; a code of 60 numbers keeps them, roughly.",
            masks,
        ),
        Sheet(
            "MEInst, figure 3: from a mask to a code and back",
            "The largest object: in the image, in its box's 28 x 28 grid, the first components, and the mask again from"
            " codes of several lengths.",
            pipeline,
        ),
    ]


def _pipeline(image: Tensor, target: Target, codecs: dict[int, MaskCodec]) -> list[tuple[str, Image.Image]]:
    largest = int(target.masks.flatten(1).sum(1).argmax())
    box = target.boxes[largest]
    grid = cut_mask(target.masks[largest], box, 28)
    x0, y0, x1, y1 = box.round().int().tolist()
    row = [("object", _enlarged(image[:, y0:y1, x0:x1])), ("28 x 28", _grey(grid.float()))]
    components = codecs[60].components[:4].reshape(-1, 28, 28)
    low, high = components.min(), components.max()
    row += [(f"component {i + 1}", _grey((part - low) / (high - low))) for i, part in enumerate(components)]
    for length, codec in codecs.items():
        again = codec.decode(codec.encode(grid[None]))[0]
        row.append((f"from {length} numbers", _grey((again >= 0.5).float())))
    return row


def assignment(images: ShapesDataset) -> Sheet:
    """SAIS' figure 2: which object each location answers for, by FCOS' rule and by the centre-aware one."""
    rows = _one_level(*by_hand(TWO_BOXES))
    for image, target in _all(images):
        target = replace(target, labels=torch.arange(len(target)))  # a colour for each object
        row = [("objects", _boxed(draw(image, whole(target), []), target.boxes))]
        row += [(f"all levels, {name}", _map(_answers(target, aware))) for name, aware in RULES]
        rows.append(row)
    return Sheet(
        "SAIS, figure 2: area-aware against centre-aware targets",
        "Each square is a location, as large as its level's stride, in the colour of the object that it answers for;"
        " black ones are background. First two boxes given by hand, level P4 alone, which answers for what is up to 128"
        " px from a box's sides: where both claim a location FCOS takes the smaller one, and the large object loses its"
        " own centre (ring), though nowhere is it more central; below, the centre-ness that decides instead, the larger"
        " the brighter. Then generated images, all levels: large objects are learned at coarse levels, small ones lie"
        " on top.",
        rows,
    )


def _one_level(image: Tensor, target: Target) -> list[list[tuple[str, Image.Image]]]:
    """P4 of a large and a small box: by both rules, then the centre-ness of each alone and the larger of both."""
    rules = [("two boxes, given by hand", draw(image, whole(target), []))]
    rules += [(f"P4, {name}", _map(_answers(target, aware), stride=16)) for name, aware in RULES]
    shaded = [
        (f"centre-ness in the {name} box", _map(_answers(target[torch.tensor([i])], True), stride=16, shaded=True))
        for i, name in enumerate(("large", "small"))
    ]
    shaded.append(("the larger of both", _map(_answers(target, True), stride=16, shaded=True)))
    centre = _centres(target.boxes[:1])
    return [[(name, _ringed(_boxed(panel, target.boxes), centre)) for name, panel in row] for row in (rules, shaded)]


def _answers(target: Target, center_aware: bool) -> fcos.Assignment:
    nothing = torch.empty(0)
    raw = SAISOutput(fcos.locations(SIZES), SIZES, nothing, nothing, nothing, [], None, None)
    config = replace(sais.method.METHOD.variants["r50_768"], masks=False, center_aware=center_aware)
    return sais_targets([target], raw, config).locations


def positive_pixels(images: ShapesDataset) -> Sheet:
    """SPRNet's figure 4: the pixels whose best anchor overlaps an object enough."""
    config = sprnet.method.METHOD.variants["r50_800"]
    anchors = retinanet.anchors(SIZES, retinanet.STRIDES, base_size=config.anchor_size)
    raw = SPRNetOutput(anchors, SIZES, torch.empty(0), torch.empty(0), [])
    frame = ImageFrame((SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE), (1.0, 1.0))
    rows = []
    for image, target in [by_hand(ONE_BOX), *_all(images)]:
        row = []
        for threshold in (0.5, 0.7):
            pixels = sprnet_targets([target], raw, [frame], replace(config, mask_iou=threshold)).pixels[0]
            picture = _boxed(draw(image, nothing(target), []), target.boxes)
            _dots(picture, _centres(anchors[pixels * ANCHORS_PER_PIXEL]), RED)
            row.append((f"IoU above {threshold}: {len(pixels)} pixels", picture))
        rows.append(row)
    rows[0].insert(0, _two_anchors(*by_hand(ONE_BOX), anchors))
    return Sheet(
        "SPRNet, figure 4: positive pixels",
        "Green: objects' boxes. First a box given by hand with an anchor that overlaps it by more than 0.7 (red), which"
        " makes its pixel positive, and a pixel whose best anchor (blue) does not. Red dots: all pixels one of whose"
        " anchors overlaps a box by more than the threshold; each is decoded to a mask of its own.",
        rows,
    )


def _two_anchors(image: Tensor, target: Target, anchors: Tensor) -> tuple[str, Image.Image]:
    """The anchor that overlaps a box most, and the best one of a pixel where none comes up to one half."""
    iou, which = retinanet.match(anchors, target.boxes).iou.view(-1, ANCHORS_PER_PIXEL).max(1)
    picture = _boxed(draw(image, nothing(target), []), target.boxes)
    shown = []
    for pixel, colour in ((iou.argmax(), RED), (iou.where(iou < 0.5, 0.0).argmax(), BLUE)):
        anchor = anchors[pixel * ANCHORS_PER_PIXEL + which[pixel]][None]
        _dots(_boxed(picture, anchor, colour), _centres(anchor), colour)
        shown.append(f"{iou[pixel]:.2f}")
    return f"a box given by hand; IoU with it: red {shown[0]}, positive; blue {shown[1]}, negative", picture


def by_hand(boxes: tuple[tuple[float, ...], ...]) -> tuple[Tensor, Target]:
    """An image of ellipses that fill boxes, large ones behind."""
    corners = torch.tensor(boxes)
    centres, reach = _centres(corners), (corners[:, 2:] - corners[:, :2]) / 2
    places = torch.arange(SIZE) + 0.5
    x, y = (((places - centres[:, [axis]]) / reach[:, [axis]]) ** 2 for axis in (0, 1))
    masks = (y[:, :, None] + x[:, None] < 1).to(torch.uint8)
    image = torch.full((3, SIZE, SIZE), 60, dtype=torch.uint8)
    for i in range(len(boxes)):
        image[:, masks[i].bool()] = 110 + 50 * i
        masks[:i] *= 1 - masks[i]
    labels = torch.arange(len(boxes))
    return image, Target(corners, labels, masks, torch.zeros(len(boxes), dtype=torch.bool))


def trained(tables: Path, method: Method, rows: tuple[str, ...], title: str, text: str) -> list[Sheet]:
    """What the networks of a small table's rows find in the same images."""
    number, *names = rows
    table = next(table for table in method.tables() if table.number == number)
    settings = Settings(profile="smoke")
    images = ShapesDataset(NUM_IMAGES, split="val", size=128)
    columns: list[list[tuple[str, Image.Image]]] = [[("ground truth", draw(i, whole(t), [])) for i, t in _all(images)]]
    for name in names:
        entry = entry_of(method, table, table.row(name), settings, 0)
        weights = tables / "trainings" / f"{method.name}-{entry.training[:12]}" / "best.safetensors"
        if not weights.is_file():
            chosen = " ".join(f'"{name}"' for name in names)
            command = f"python -m onestage.tables {table.session} {method.name} --profile smoke --rows {chosen}"
            return [Sheet(title, text, missing=f"needs: {command}")]
        state, info = load_weights(weights, package=method.name)
        model: Any = method.build(replace(entry.config, num_classes=len(images.categories)))
        load_into(model, state, info, head="reinit" if entry.row.finish else "match", categories=images.categories)
        if entry.row.finish and method.finish is not None:
            method.finish(model, ShapesDataset(settings.counts("coco")[0], size=128))
        columns.append([(name, _found(model.eval(), image)) for image, _ in _all(images)])
    text += f" Trained for {info.steps} steps on generated shapes; shown is what scores {LEAST_SCORE} or more."
    return [Sheet(title, text, [list(row) for row in zip(*columns, strict=True)])]


def _found(model: Any, image: Tensor) -> Image.Image:
    found = model.detect([image])[0]
    found = found[found.scores >= LEAST_SCORE]
    masks = found.masks.to_bool()
    return draw(image, Instances(found.boxes, found.labels, masks, None, found.unrefined_boxes), [])


def whole(target: Target) -> Instances:
    """Everything of the ground truth."""
    return Instances(target.boxes, target.labels, target.masks.bool())


def nothing(target: Target) -> Instances:
    """The image alone."""
    return Instances(target.boxes[:0], target.labels[:0], target.masks[:0].bool())


def _all(images: ShapesDataset) -> list[tuple[Tensor, Target]]:
    return [images[i] for i in range(len(images))]


def _map(found: fcos.Assignment, *, stride: int | None = None, shaded: bool = False) -> Image.Image:
    """Locations of one image as squares in the colours of their labels, coarse levels first.

    Args:
        found: What the locations answer for.
        stride: Of the one level that is shown; None: all are.
        shaded: The less central a location, the darker.
    """
    factor, points = SHOWN_WIDTH / SIZE, fcos.locations(SIZES)
    labels, centerness = found.labels[0], fcos.centerness_target(found.ltrb[0])
    picture = Image.new("RGB", (SHOWN_WIDTH, SHOWN_WIDTH))
    pen = ImageDraw.Draw(picture)
    for i in found.strides.argsort(descending=True, stable=True).tolist():
        if labels[i] >= 0 and stride in (None, int(found.strides[i])):
            (x, y), half = points[i].tolist(), float(found.strides[i]) / 2
            corners = [factor * (x - half), factor * (y - half), factor * (x + half) - 1, factor * (y + half) - 1]
            shade = float(centerness[i]) if shaded else 1.0
            red, green, blue = (round(shade * part) for part in colour_of(int(labels[i])))
            pen.rectangle(corners, fill=(red, green, blue), outline=(0, 0, 0))
    return picture


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _boxed(picture: Image.Image, boxes: Tensor, colour: tuple[int, int, int] = GREEN) -> Image.Image:
    pen, factor = ImageDraw.Draw(picture), SHOWN_WIDTH / SIZE
    for box in boxes.tolist():
        pen.rectangle([factor * side for side in box], outline=colour, width=2)
    return picture


def _ringed(picture: Image.Image, centres: Tensor) -> Image.Image:
    pen, factor = ImageDraw.Draw(picture), SHOWN_WIDTH / SIZE
    for x, y in centres.tolist():
        pen.ellipse([factor * x - 20, factor * y - 20, factor * x + 20, factor * y + 20], outline=RED, width=3)
    return picture


def _dots(picture: Image.Image, centres: Tensor, colour: tuple[int, int, int]) -> None:
    pen, factor = ImageDraw.Draw(picture), SHOWN_WIDTH / SIZE
    for x, y in centres.tolist():
        pen.ellipse([factor * x - 3, factor * y - 3, factor * x + 3, factor * y + 3], fill=colour, outline=(255,) * 3)


def _grey(values: Tensor) -> Image.Image:
    """[28, 28] in 0..1, enlarged without smoothing."""
    return to_pil_image(values.clamp(0, 1)).convert("RGB").resize((168, 168), Image.Resampling.NEAREST)


def _enlarged(image: Tensor) -> Image.Image:
    return to_pil_image(image).resize((168, 168), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
