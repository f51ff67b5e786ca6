"""MEInst's Table 1 and Figure 4: the mask head of torchvision's Mask R-CNN on its own boxes and on those of FCOS.

    python benchmarks/swapped_boxes.py --data coco --mask-rcnn COCO_V1 --fcos fcos.safetensors

FCOS is MEInst without its mask branch (`python -m meinst.train --variant boxes_only`); any weights of MEInst serve, as
their boxes alone are used. One Mask R-CNN R-50 makes all masks, as in the paper. Prints box AP, mask AP and the number
of boxes per image that score above 0.05, and writes one record to results/accuracy/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.transform import resize_boxes
from tqdm import tqdm

from meinst import get_model
from onestage.data.coco import CocoDataset, locate
from onestage.engine.checkpoint import read_state_dict
from onestage.engine.coco_eval import CocoEvaluator
from onestage.files import file_digest
from onestage.masks import Masks
from onestage.structures import Detections
from onestage.tables.record import write_record

COUNTED = 0.05  # score from which a box counts, Figure 4

Find = Callable[[Tensor], Detections]  # [3, H, W] uint8 RGB to boxes in its pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set in COCO's format; default: COCO_ROOT")
    parser.add_argument("--mask-rcnn", required=True, help="a .pth of torchvision's model, or COCO_V1 to download it")
    parser.add_argument("--fcos", type=Path, nargs="+", required=True, help="weights of MEInst")
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "accuracy")
    options = parser.parse_args()
    place = locate(options.data, "val")
    dataset: Any = CocoDataset(place.json, place.images)
    if options.limit is not None:
        dataset = dataset.subset(range(min(options.limit, len(dataset))))
    mask_rcnn = mask_rcnn_of(options.mask_rcnn).to(options.device)
    finders: dict[str, Find] = {"Mask R-CNN": lambda image: own_boxes(mask_rcnn, image, dataset.categories)}
    for path in options.fcos:
        model: Any = get_model("r50", weights=path).to(options.device)
        finders[path.stem] = lambda image, model=model: model.detect([image], masks=False)[0]  # type: ignore[misc]
    results = {name: measure(mask_rcnn, find, dataset, options.device, name) for name, find in finders.items()}
    print("| boxes | mask AP | box AP | boxes per image |\n| --- | --- | --- | --- |")
    for name, found in results.items():
        aps = " | ".join(f"{100 * found[key]:.1f}" for key in ("segm/AP", "bbox/AP"))
        print(f"| {name} | {aps} | {found['boxes_per_image']:.1f} |")
    weights = {path.stem: file_digest(path) for path in options.fcos}
    config = {"data": file_digest(place.json), "images": len(dataset), "mask_rcnn": options.mask_rcnn, "fcos": weights}
    path = write_record(options.results, "swapped-boxes", config, {"kind": "accuracy", "results": results})
    print(f"record: {path}")


def mask_rcnn_of(weights: str) -> Any:
    """Mask R-CNN R-50 from a file, or torchvision's own; in eval mode."""
    if not Path(weights).is_file():
        return maskrcnn_resnet50_fpn(weights=MaskRCNN_ResNet50_FPN_Weights[weights]).eval()
    state = read_state_dict(weights)
    num_classes = state["roi_heads.box_predictor.cls_score.weight"].shape[0]
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    model.load_state_dict(state)
    return model.eval()


def measure(mask_rcnn: Any, find: Find, dataset: Any, device: str, name: str) -> dict[str, float]:
    """AP of the boxes and of Mask R-CNN's masks in them, as fractions, and how many boxes count in an image."""
    evaluator = CocoEvaluator(dataset.coco_gt(), dataset.categories)
    counted = 0
    for i in tqdm(range(len(dataset)), desc=name, unit="image", leave=False):
        image, target = dataset[i]
        found = find(image.to(device))
        counted += int((found.scores > COUNTED).sum())
        evaluator.add(target.image_id, with_masks(mask_rcnn, image.to(device), found, dataset.categories).to("cpu"))
    return evaluator.summarize() | {"boxes_per_image": counted / len(dataset)}


@torch.no_grad()
def own_boxes(mask_rcnn: Any, image: Tensor, categories: Sequence[tuple[int, str]]) -> Detections:
    """What Mask R-CNN detects of the data set's categories, which it knows by their ids."""
    (found,) = mask_rcnn([image.float() / 255])
    label_of = {key: label for label, (key, _) in enumerate(categories)}
    known = torch.tensor([key in label_of for key in found["labels"].tolist()], dtype=torch.bool, device=image.device)
    labels = torch.tensor([label_of[key] for key in found["labels"][known].tolist()], dtype=torch.int64)
    size = (image.shape[1], image.shape[2])
    return Detections(size, found["boxes"][known], found["scores"][known], labels.to(image.device))


@torch.no_grad()
def with_masks(mask_rcnn: Any, image: Tensor, found: Detections, categories: Sequence[tuple[int, str]]) -> Detections:
    """The same boxes with the masks that Mask R-CNN's mask head sees in them."""
    size = (image.shape[1], image.shape[2])
    keys = torch.tensor(
        [categories[label][0] for label in found.labels.tolist()], dtype=torch.int64, device=image.device
    )
    images, _ = mask_rcnn.transform([image.float() / 255])
    heads = mask_rcnn.roi_heads
    boxes = resize_boxes(found.boxes, size, images.image_sizes[0])
    regions = heads.mask_roi_pool(mask_rcnn.backbone(images.tensors), [boxes], images.image_sizes)
    (masks,) = maskrcnn_inference(heads.mask_predictor(heads.mask_head(regions)), [keys])
    (pasted,) = mask_rcnn.transform.postprocess([{"boxes": boxes, "masks": masks}], images.image_sizes, [size])
    return Detections(size, found.boxes, found.scores, found.labels, Masks.from_bool(pasted["masks"][:, 0] >= 0.5))


if __name__ == "__main__":
    main()
