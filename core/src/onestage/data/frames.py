"""Frames of a video file, a folder or a camera, one at a time; and a video, or pictures, to write frames into.

PyAV does the decoding and encoding (the extra `video`); a folder needs nothing.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from onestage.data.coco import read_image
from onestage.data.validate import MAX_PIXELS
from onestage.errors import DatasetError, MachineError, UsageError, some

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"])
VIDEO_SUFFIXES = frozenset([".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"])
FOLDER_RATE = 10.0  # frames per second of a video that is made of a folder of frames
KEYFRAME_EVERY = 12  # frames of a written video that are lost at most if the process is killed

logger = logging.getLogger("onestage")


@dataclass(frozen=True)
class FrameSource:
    """Where frames come from; iterating reads them one after the other, and holds one.

    Args:
        name: What an error and a progress bar call it.
        kind: `file`, `folder` or `camera`.
        place: The file or folder, or what the camera is opened by.
        num_frames: How many there are, where that is known.
        rate: Frames per second, where that is known.
        max_pixels: Largest height * width of a frame.
        package: Whose extra `video` has PyAV.
    """

    name: str
    kind: str
    place: Path
    num_frames: int | None
    rate: float | None
    max_pixels: float
    package: str

    def __iter__(self) -> Iterator[Tensor]:
        """[3, H, W] uint8 RGB each, all of one size.

        Raises:
            DatasetError: a frame that cannot be read, is too large or of another size than the first.
        """
        size: tuple[int, ...] | None = None
        frames = _images_of(self) if self.kind == "folder" else _decoded(self)
        for number, (name, frame) in enumerate(frames):
            if size is not None and size != tuple(frame.shape[1:]):
                raise DatasetError(
                    f"frame {name} of '{self.name}' is {frame.shape[1]} x {frame.shape[2]} px, those before "
                    f"{number} are {size[0]} x {size[1]}",
                    "give frames of one size (height x width)",
                )
            size = tuple(frame.shape[1:])
            yield frame

    def bar(self, what: str, *, stride: int, limit: int | None, quiet: bool) -> Any:
        """A progress bar on stderr, for every `stride`-th frame and at most `limit` of these; `quiet`: none."""
        total = None if self.num_frames is None else -(-self.num_frames // stride)
        if limit is not None:
            total = min(total or limit, limit)
        pace = 0.5 if sys.stderr.isatty() else 20  # seconds between updates: a log wants few
        return tqdm(total=total, desc=what, unit="frame", disable=quiet, leave=False, mininterval=pace)


def open_source(word: str, *, package: str, max_pixels: float = MAX_PIXELS) -> FrameSource:
    """The frames that a command line's SOURCE names: a video file, a folder of images, or the number of a camera.

    Args:
        word: The SOURCE.
        package: Whose command line.
        max_pixels: Largest height * width of a frame.

    Raises:
        UsageError: nothing there, or a folder without images.
        MachineError: PyAV is missing, or the camera.
        DatasetError: a file that holds no video.
    """
    place = Path(word)
    if place.is_dir():
        files = _files_of(place)
        if not files:
            raise UsageError(f"SOURCE '{word}' has no images", f"it may hold {some(sorted(IMAGE_SUFFIXES), 12)}")
        return FrameSource(word, "folder", place, len(files), None, max_pixels, package)
    if is_camera(word):
        return _camera(int(word), max_pixels, package)
    if not place.is_file():
        raise UsageError(f"SOURCE '{word}' does not exist", "name a video, a folder of frames, or a camera's number")
    if place.suffix.lower() in IMAGE_SUFFIXES - {".gif"}:
        raise UsageError(f"SOURCE '{word}' is one image", "name a video or the folder of its frames")
    av = import_av(word, package)
    try:
        with av.open(str(place)) as container:
            stream = _video_stream(container, word)
            rate = None if stream.average_rate is None else float(stream.average_rate)
            return FrameSource(word, "file", place, stream.frames or None, rate, max_pixels, package)
    except av.FFmpegError as error:
        raise DatasetError(f"SOURCE '{word}' cannot be read: {error.strerror}", "give a video that plays") from None


def is_camera(word: str) -> bool:
    """Whether a SOURCE is the number of a camera."""
    return word.isdecimal() and not Path(word).exists()


def is_image(path: Path) -> bool:
    """Whether this is a file that is named like an image and not hidden, as macOS' `._` twins of files are."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def import_av(source: str, package: str) -> ModuleType:
    """PyAV, for what `source` names.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise MachineError(
            f"SOURCE '{source}' is a video and PyAV is not installed", f"pip install './{package}[video]'"
        ) from None
    module: ModuleType = av
    return module


class VideoWriter:
    """An MP4 file that frames are written into; what is written can be played even if the process is killed.

    Args:
        path: Replaced if it is there.
        size: (height, width) of the frames. Odd ones get a last row or column twice, as the format wants even ones.
        rate: Frames per second.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float):
        import av

        self._av: Any = av
        # Fragments: the file has no index at its end that would be missing.
        self._file = av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"})
        known = "libx264" in av.codecs_available
        self._stream = self._file.add_stream(
            "libx264" if known else "mpeg4", rate=Fraction(rate).limit_denominator(1001)
        )
        self._stream.width, self._stream.height = size[1] + size[1] % 2, size[0] + size[0] % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.gop_size = KEYFRAME_EVERY
        if known:
            self._stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            self._stream.bit_rate = 4_000_000

    def write(self, frame: Tensor) -> None:
        """Appends a frame [3, H, W] uint8 RGB."""
        height, width = frame.shape[1:]
        even = F.pad(frame[None].float(), (0, width % 2, 0, height % 2), "replicate")[0].to(torch.uint8)
        picture = self._av.VideoFrame.from_ndarray(even.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        for packet in self._stream.encode(picture):
            self._file.mux(packet)

    def close(self) -> None:
        """Writes what the encoder still holds."""
        for packet in self._stream.encode():
            self._file.mux(packet)
        self._file.close()


class DrawnFrames:
    """Frames with what was found drawn in: a video, or images where PyAV is missing, as a folder needs none.

    Args:
        video: The MP4 file; images go into the folder `frames` beside it.
        source: Of the frames.
        rate: Frames per second; None: the source's.
        stride: Only every n-th frame comes.
    """

    def __init__(self, video: Path, source: FrameSource, *, rate: float | None = None, stride: int = 1):
        self.path = video
        self.rate = rate or (source.rate or FOLDER_RATE) / stride
        self.video: VideoWriter | None = None
        self.folder: Path | None = None
        if find_spec("av") is None:
            logger.info("PyAV is not installed: pictures instead of a video; pip install './%s[video]'", source.package)
            self.folder = video.with_name("frames")
            self.folder.mkdir(exist_ok=True)

    def add(self, number: int, picture: Tensor) -> None:
        """Frame `number` as a picture [3, H, W] uint8 RGB."""
        if self.folder is not None:
            to_pil_image(picture).save(self.folder / f"{number:06d}.jpg", quality=92)
            return
        if self.video is None:
            height, width = picture.shape[1:]
            self.video = VideoWriter(self.path, (height, width), self.rate)
        self.video.write(picture)

    def close(self) -> None:
        """Completes the video."""
        if self.video is not None:
            self.video.close()


def _files_of(folder: Path) -> list[Path]:
    """The images of a folder, numbers in their names in the order of numbers."""
    files = [path for path in folder.iterdir() if is_image(path)]
    return sorted(files, key=lambda path: [int(part) if part.isdecimal() else part for part in _SPLIT(path.name)])


_SPLIT = re.compile(r"(\d+)").split


def _images_of(source: FrameSource) -> Iterator[tuple[str, Tensor]]:
    for path in _files_of(source.place):
        yield f"'{path.name}'", read_image(path, max_pixels=source.max_pixels)


def _decoded(source: FrameSource) -> Iterator[tuple[str, Tensor]]:
    av = import_av(source.name, source.package)
    number = 0
    try:
        with av.open(str(source.place), format=_camera_format() if source.kind == "camera" else None) as container:
            stream = _video_stream(container, source.name)
            if stream.width * stream.height > source.max_pixels:
                raise DatasetError(
                    f"SOURCE '{source.name}' has {stream.width} x {stream.height} px; the limit is "
                    f"{source.max_pixels / 1e6:g} megapixels",
                    "make it smaller, or raise --max-pixels",
                )
            for picture in container.decode(stream):
                pixels = torch.from_numpy(picture.to_ndarray(format="rgb24"))
                turns = round(getattr(picture, "rotation", 0) / 90) % 4  # of a telephone held upright
                yield str(number), pixels.permute(2, 0, 1).rot90(turns, (1, 2)).contiguous()
                number += 1
    except av.FFmpegError as error:
        raise DatasetError(
            f"SOURCE '{source.name}' breaks off after {number} frames: {error.strerror}",
            "what came before is done and kept; is the file complete?",
        ) from None


def _video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise DatasetError(f"SOURCE '{name}' has no video in it", "give a video file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _camera(number: int, max_pixels: float, package: str) -> FrameSource:
    import_av(str(number), package)
    place = Path(f"/dev/video{number}") if sys.platform.startswith("linux") else Path(str(number))
    if sys.platform == "win32" or (sys.platform.startswith("linux") and not place.exists()):
        why = "cameras have no numbers on Windows" if sys.platform == "win32" else f"'{place}' does not exist"
        raise MachineError(f"camera {number} cannot be opened: {why}", "plug it in, or record a file and name that")
    return FrameSource(f"camera {number}", "camera", place, None, None, max_pixels, package)


def _camera_format() -> str:
    return "v4l2" if sys.platform.startswith("linux") else "avfoundation"
