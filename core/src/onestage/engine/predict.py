"""`Predictor`: from a weights file and an image, in whatever form, to a `Result`."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from onestage.config import config_from_dict
from onestage.data.coco import read_image, rgb_of
from onestage.data.validate import MAX_PIXELS
from onestage.engine.checkpoint import WeightsInfo, load_into, load_weights
from onestage.engine.distributed import pick_device
from onestage.engine.export import load_exported
from onestage.engine.guard import autocast
from onestage.engine.network import Mode, prepare_network
from onestage.errors import MachineError, UsageError, WeightsError
from onestage.masks import Masks
from onestage.method import Method
from onestage.structures import Detections

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# Colours of drawn instances, apart from each other and from most photographs.
PALETTE = (
    (230, 60, 60), (60, 130, 240), (50, 180, 90), (245, 160, 30), (160, 80, 220), (30, 190, 200),
    (235, 90, 170), (150, 170, 40), (120, 100, 70), (90, 90, 200),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What was found in one image, N instances, scores descending; `result[keep]` selects.

    Args:
        detections: Boxes xyxy, scores, labels and masks (of a model that has them), on the CPU, in image pixels.
        categories: (id, name) of each label 0..K-1, as in the data set the weights learned from.
    """

    detections: Detections
    categories: tuple[tuple[int, str], ...]

    def __len__(self) -> int:
        return len(self.detections)

    def __getitem__(self, keep: Tensor | slice | int) -> Result:
        """The instances that a bool or int64 tensor, a slice or an index selects."""
        if isinstance(keep, int):
            keep = torch.tensor([range(len(self))[keep]])
        return Result(self.detections[keep], self.categories)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.detections.image_size

    @property
    def boxes(self) -> Tensor:
        """[N, 4] float32 xyxy, image pixels."""
        return self.detections.boxes

    @property
    def scores(self) -> Tensor:
        """[N] float32 in [0, 1]."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """[N] int64, 0..K-1."""
        return self.detections.labels

    @property
    def names(self) -> list[str]:
        """Category of each instance."""
        return [self.categories[label][1] for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        """The data set's id of each instance's category."""
        return [self.categories[label][0] for label in self.labels.tolist()]

    @property
    def track_ids(self) -> Tensor | None:
        """[N] int64, which object of the video each one is; None for an image."""
        return self.detections.track_ids

    @property
    def masks(self) -> Masks | None:
        """N masks; `to_bool`, `to_rle`, `to_polygons`, `to_bits` give other forms. None of a model that finds boxes."""
        return self.detections.masks

    @property
    def rle(self) -> list[dict[str, Any]] | None:
        """COCO run lengths of the masks; None without masks."""
        return None if self.masks is None else self.masks.to_rle()

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Entries of a COCO results file, as `eval` writes it; without masks they have no `segmentation`."""
        entries: list[dict[str, Any]] = []
        rows = zip(self.category_ids, self.boxes.tolist(), self.scores.tolist(), strict=True)
        for category_id, (x1, y1, x2, y2), score in rows:
            bbox = [x1, y1, x2 - x1, y2 - y1]
            entries.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score})
        if self.masks is not None:
            for entry, rle in zip(entries, self.masks.to_rle(), strict=True):
                entry["segmentation"] = rle
        if self.detections.mask_scores is not None:
            for entry, mask_score in zip(entries, self.detections.mask_scores.tolist(), strict=True):
                entry["mask_score"] = mask_score
        return entries

    def to_supervision(self) -> Any:
        """`supervision.Detections`, where that library is installed."""
        try:
            import supervision  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise MachineError("supervision is not installed", "pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=None if self.masks is None else self.masks.to_bool().numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names)},
        )

    def draw(self, image: ImageLike, *, opacity: float = 0.5, boxes: bool = True) -> Tensor:
        """The image with masks (if any), boxes, names and scores on it; objects of a video keep colour and number.

        Args:
            image: The image the result is of.
            opacity: Of the masks, 0..1.
            boxes: Draw boxes and their texts too.

        Returns:
            [3, H, W] uint8 RGB.
        """
        canvas = _to_uint8(to_tensor(image)).clone()
        if tuple(canvas.shape[-2:]) != self.image_size:
            raise UsageError(
                f"the image is {tuple(canvas.shape[-2:])}, the result's is {self.image_size} (height, width)",
                "draw on the image that was predicted",
            )
        numbers = range(len(self)) if self.track_ids is None else self.track_ids.tolist()
        colours = [PALETTE[number % len(PALETTE)] for number in numbers]
        if self.masks is not None:
            _draw_masks(canvas, self.masks, colours, opacity)
        if boxes and len(self):
            texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
            if self.track_ids is not None:
                texts = [f"#{number} {text}" for number, text in zip(numbers, texts, strict=True)]
            width = max(1, round(max(self.image_size) / 400))
            canvas = draw_bounding_boxes(canvas, self.boxes, texts, colours, width=width)
        return canvas


class Predictor:
    """A model ready for images. Threads may share it, and other processes take a copy of it (pickled).

    Args:
        model: With `detect(images)`; is put into eval mode and moved.
        categories: (id, name) of each label.
        device: auto, cpu, cuda, cuda:N.
        precision: fp32, bf16 or fp16.
        score_threshold: What scores less is left out; 0 leaves it to the model.
        max_detections: Of one image; None leaves it to the model.
        max_pixels: Largest image read from a file, height * width.
        mode: eager, compile, or graph (CUDA graphs); see `onestage.engine.network`.
        channels_last: Order of weights and pixels.
    """

    def __init__(
        self,
        model: Any,
        categories: Sequence[tuple[int, str]],
        *,
        device: str = "auto",
        precision: str = "fp32",
        score_threshold: float = 0.0,
        max_detections: int | None = None,
        max_pixels: float = MAX_PIXELS,
        mode: Mode = "eager",
        channels_last: bool = False,
    ):
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.mode: Mode = mode
        self.channels_last = channels_last
        self._prepare()
        self.categories = tuple((int(number), str(name)) for number, name in categories)
        self.precision = precision
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self.max_pixels = max_pixels

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        method: Method | None = None,
        device: str = "auto",
        precision: str = "fp32",
        score_threshold: float = 0.3,
        max_detections: int | None = None,
        max_pixels: float = MAX_PIXELS,
        mode: Mode = "eager",
        channels_last: bool = False,
    ) -> Predictor:
        """Builds the model that a weights file describes.

        Args:
            path: Weights of ours, or a last.ckpt.
            method: The paper's package; None: found among the installed ones.
            device: auto, cpu, cuda, cuda:N.
            precision: fp32, bf16 or fp16.
            score_threshold: What scores less is left out; also lowers the model's own threshold if that is higher.
            max_detections: Of one image; None: as the weights' config says.
            max_pixels: Largest image read from a file, height * width.
            mode: eager, compile or graph.
            channels_last: Order of weights and pixels.
        """
        state, info = load_weights(path, package=method.name if method else None)
        method = method or find_method(info.package)
        config: Any = config_from_dict(method.config_type, info.config)
        model = method.build(_with_limits(config, score_threshold, max_detections))
        load_into(model, state, info)
        return cls(
            model,
            _categories(info, config),
            device=device,
            precision=precision,
            score_threshold=score_threshold,
            max_detections=max_detections,
            max_pixels=max_pixels,
            mode=mode,
            channels_last=channels_last,
        )

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        *,
        runtime: Literal["onnx", "torch"] = "onnx",
        method: Method | None = None,
        device: str = "cpu",
        score_threshold: float = 0.3,
        max_detections: int | None = None,
        max_pixels: float = MAX_PIXELS,
    ) -> Predictor:
        """Runs an exported network; resizing, selection and masks are the package's own.

        Args:
            folder: What the verb `export` wrote.
            runtime: "onnx": onnxruntime; "torch": the `torch.export` program, which may do anything that Python can:
                for folders you trust.
            method: The paper's package; None: found among the installed ones.
            device: cpu, cuda, cuda:N.
            score_threshold, max_detections, max_pixels: As for `from_weights`.
        """
        model, info = load_exported(
            folder,
            method_of=lambda package: method or find_method(package),
            runtime=runtime,
            device=pick_device(device),
            configured=lambda config: _with_limits(config, score_threshold, max_detections),
        )
        return cls(
            model,
            _categories(info, model.config),
            device=device,
            score_threshold=score_threshold,
            max_detections=max_detections,
            max_pixels=max_pixels,
        )

    @overload
    def __call__(self, source: ImageLike) -> Result: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, source: Sequence[ImageLike]) -> list[Result]: ...

    def __call__(self, source: ImageLike | Sequence[ImageLike]) -> Result | list[Result]:
        """Finds instances.

        Args:
            source: A path, a PIL image, an RGB array [H, W, 3] or a tensor [3, H, W] (uint8, or float in 0..1), or a
                list of them. The orientation tag of files and PIL images is applied.

        Returns:
            One result, or a list of them for a list.
        """
        if isinstance(source, (list, tuple)):
            return [self._predict(image) for image in source]
        return self._predict(source)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepared network and the lock: a copy makes its own."""
        state = {name: value for name, value in self.__dict__.items() if name != "_turn"}
        if self._is_prepared:
            state["model"] = copy.copy(self.model)
            del state["model"].__dict__["raw_outputs"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def _is_prepared(self) -> bool:
        return self.mode != "eager" or self.channels_last

    def _prepare(self) -> None:
        if self._is_prepared:
            prepare_network(self.model, mode=self.mode, channels_last=self.channels_last)
        # A graph writes its outputs to the same memory every time: one image after the other.
        self._turn: AbstractContextManager[Any] = threading.Lock() if self.mode == "graph" else nullcontext()

    @torch.no_grad()
    def _predict(self, source: ImageLike) -> Result:
        image = to_tensor(source, max_pixels=self.max_pixels).to(self.device)
        with self._turn, autocast(self.device, self.precision):
            try:
                found: Detections = self.model.detect([image])[0]
            except torch.OutOfMemoryError as error:
                now = torch.cuda.memory_allocated(self.device) / 1e9
                peak = torch.cuda.max_memory_allocated(self.device) / 1e9
                what = f"GPU memory ran out on an image of {tuple(image.shape[-2:])}"
                raise MachineError(
                    f"{what}: {now:.1f} GB in use, {peak:.1f} GB at the peak",
                    "add --device cpu, --precision bf16 or a lower --max-dets",
                ) from error
            found = found.to("cpu")
        keep = found.scores >= self.score_threshold
        return Result(found[keep][: self.max_detections], self.categories)


def _categories(info: WeightsInfo, config: Any) -> Sequence[tuple[int, str]]:
    """(id, name) of each label; numbers where the weights do not say."""
    return info.categories or [(label, str(label)) for label in range(config.num_classes)]


def _with_limits(config: Any, score_threshold: float, max_detections: int | None) -> Any:
    """The config whose own threshold lets through what is asked for."""
    inference = replace(
        config.inference, score_threshold=min(config.inference.score_threshold, max(score_threshold, 0.0))
    )
    if max_detections is not None:
        inference = replace(inference, max_detections=max_detections)
    return replace(config, inference=inference)


def find_method(package: str) -> Method:
    """The installed paper package of that name.

    Only packages that announce themselves are imported: a weights file may name anything.
    """
    loaded = sys.modules.get(f"{package}.method")
    if loaded is not None and isinstance(getattr(loaded, "METHOD", None), Method):
        method: Method = loaded.METHOD
        return method
    for entry in entry_points(group="onestage.methods"):
        if entry.name == package:
            found = entry.load()
            assert isinstance(found, Method)
            return found
    raise WeightsError(
        f"weights belong to the package '{package}', which is not installed", f"pip install ./{package} in the checkout"
    )


def to_tensor(source: ImageLike, *, max_pixels: float = MAX_PIXELS) -> Tensor:
    """Any form of image as [3, H, W] RGB, uint8 or float in 0..1."""
    if isinstance(source, (str, Path)):
        return read_image(Path(source), max_pixels=max_pixels)
    if isinstance(source, Image.Image):
        source = rgb_of(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        array = source[:, :, None].repeat(3, 2) if source.ndim == 2 else source
        if array.ndim != 3 or array.shape[2] not in (3, 4):
            raise UsageError(f"image array is {source.shape}", "give [height, width, 3] RGB")
        source = torch.from_numpy(np.array(array[:, :, :3])).permute(2, 0, 1).contiguous()
    if not isinstance(source, Tensor):
        raise UsageError(
            f"an image cannot be a {type(source).__name__}", "give a path, a PIL image, an array or a tensor"
        )
    if source.ndim != 3 or source.shape[0] != 3 or 0 in source.shape:
        raise UsageError(f"image tensor is {tuple(source.shape)}", "give [3, height, width] RGB")
    return source.detach()


def _draw_masks(canvas: Tensor, masks: Masks, colours: Sequence[tuple[int, int, int]], opacity: float) -> None:
    """Fills the masks in `canvas` [3, H, W] uint8, the best on top."""
    for index in reversed(range(len(masks))):
        x0, y0, x1, y1 = masks.windows[index].tolist()
        if x1 > x0 and y1 > y0:
            window = masks[index].pixels.reshape(x1 - x0, y1 - y0).T
            part = canvas[:, y0:y1, x0:x1]
            part[:] = draw_segmentation_masks(part, window, alpha=opacity, colors=[colours[index]])


def _to_uint8(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)
