"""`python -m sipmask.track` and `follow`: sources, what is left on disk, interruption, memory."""

import gc
import itertools
import json
import os
import signal
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from onestage.cli.app import main
from onestage.data.clips import ClipsDataset
from onestage.data.frames import VideoWriter, open_source
from onestage.data.validate import Video
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.engine.predict import Predictor
from onestage.engine.ytvis_eval import check_video_results
from onestage.errors import DatasetError, MachineError, UsageError
from onestage.masks import Masks
from sipmask.config import SMALL, VIDEO_SMALL
from sipmask.following import TrackFiles, follow
from sipmask.method import METHOD

NUM_FRAMES, SIZE = 5, 64
CATEGORIES = ((1, "ring"), (2, "star"), (5, "heart"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random parameters of a small video model that finds something everywhere."""
    from dataclasses import asdict

    config = replace(
        VIDEO_SMALL,
        num_classes=3,
        track_channels=16,
        input=replace(VIDEO_SMALL.input, test_size=(SIZE, SIZE)),
        inference=replace(VIDEO_SMALL.inference, score_threshold=0.0, max_detections=4),
    )
    torch.manual_seed(0)
    model = METHOD.build(config)
    path = tmp_path_factory.mktemp("weights") / "video.safetensors"
    info = WeightsInfo(package="sipmask", variant="video_small", config=asdict(config), categories=CATEGORIES)
    save_weights(path, model.state_dict(), info)
    return path


@pytest.fixture
def frames(tmp_path) -> Path:
    """A folder of five frames whose names sort by number, not by letter."""
    folder = tmp_path / "frames"
    folder.mkdir()
    clips = ClipsDataset(1, size=SIZE, num_frames=NUM_FRAMES)
    for number in range(NUM_FRAMES):
        to_pil_image(clips.frame(0, number)).save(folder / f"{number + 8}.png")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def track(*words: object) -> int:
    return main(METHOD, "track", ["-q", *map(str, words)])


def test_a_folder_becomes_a_video_tracks_and_results(here, frames, weights, capsys):
    av = pytest.importorskip("av")
    assert track(frames, "--weights", weights, "--score-thr", 0, "--output", "out", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == NUM_FRAMES
    assert summary["milliseconds"].keys() == {"read", "detect", "associate"}
    with av.open(str(here / "out/tracked.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shown == [(SIZE, SIZE, 3)] * NUM_FRAMES

    lines = [json.loads(line) for line in (here / "out/tracks.jsonl").read_text().splitlines()]
    by_track = json.loads((here / "out/tracks.json").read_text())
    assert by_track["num_frames"] == NUM_FRAMES
    assert [c["id"] for c in by_track["categories"]] == [1, 2, 5]
    assert sum(len(t["frames"]) for t in by_track["tracks"]) == len(lines) > 0
    assert [t["id"] for t in by_track["tracks"]] == sorted({line["track_id"] for line in lines})
    assert len(by_track["tracks"]) == summary["tracks"]

    results = json.loads((here / "out/results.json").read_text())
    dataset = ClipsDataset(1, size=SIZE, num_frames=NUM_FRAMES)
    dataset.categories = CATEGORIES
    assert len(check_video_results(results, dataset, "results")) == summary["tracks"]
    for entry, one in zip(results, by_track["tracks"], strict=True):
        own = [line for line in lines if line["track_id"] == one["id"]]
        assert entry["score"] == pytest.approx(sum(line["score"] for line in own) / len(own))
        there = {line["frame"]: line["segmentation"] for line in own}
        assert entry["segmentations"] == [there.get(number) for number in range(NUM_FRAMES)]


def test_a_video_file_gives_the_frames_that_were_written(here, frames, weights):
    pytest.importorskip("av")
    writer = VideoWriter(here / "clip.mp4", (SIZE - 1, SIZE), 12.5)
    clips = ClipsDataset(1, size=SIZE, num_frames=NUM_FRAMES)
    for number in range(NUM_FRAMES):
        writer.write(clips.frame(0, number)[:, 1:])  # 63 rows: one is added
    writer.close()
    source = open_source("clip.mp4", package="sipmask")
    assert source.rate == pytest.approx(12.5)
    read = list(source)
    assert [frame.shape for frame in read] == [(3, SIZE, SIZE)] * NUM_FRAMES
    assert (read[3][:, :-1].float() - clips.frame(0, 3)[:, 1:].float()).abs().mean() < 8
    assert track("clip.mp4", "--weights", weights, "--save", "json", "--limit", 2, "--output", "two") == 0
    assert json.loads((here / "two/tracks.json").read_text())["num_frames"] == 2
    assert not (here / "two/results.json").exists()


def test_follow_yields_frames_in_the_order_of_their_numbers_with_identities(frames, weights):
    predictor = Predictor.from_weights(weights, score_threshold=0.0)
    followed = list(follow(frames, predictor, stride=2))
    clips = ClipsDataset(1, size=SIZE, num_frames=NUM_FRAMES)
    for frame, number in zip(followed, (0, 2, 4), strict=True):
        assert torch.equal(frame.image, clips.frame(0, number))
        ids = frame.result.track_ids.tolist()
        assert len(set(ids)) == len(ids) == len(frame.result)
    picture = followed[0].result.draw(followed[0].image)
    assert picture.shape == (3, SIZE, SIZE)
    assert not torch.equal(picture, followed[0].image)


def test_an_object_keeps_its_colour(frames, weights):
    predictor = Predictor.from_weights(weights, score_threshold=0.0)
    result = next(iter(follow(frames, predictor))).result[:1]
    black = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    other = replace(result, detections=replace(result.detections, track_ids=torch.tensor([7])))
    same = replace(result, detections=replace(result.detections, track_ids=torch.tensor([17])))
    drawn = [one.draw(black, boxes=False) for one in (result, other, same)]
    assert torch.equal(drawn[1], drawn[2])  # the palette has ten colours
    assert result.masks.area()[0] == 0 or not torch.equal(drawn[0], drawn[1])


def test_without_pyav_a_folder_is_tracked_into_pictures(here, frames, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert track(frames, "--weights", weights, "--output", "out") == 0
    assert len(list((here / "out/frames").iterdir())) == NUM_FRAMES


def test_without_pyav_a_video_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (here / "clip.mp4").write_bytes(b"x")
    with pytest.raises(MachineError) as caught:
        open_source("clip.mp4", package="sipmask")
    assert caught.value.what == "SOURCE 'clip.mp4' is a video and PyAV is not installed"
    assert caught.value.fix == "pip install './sipmask[video]'"


def test_sources_that_cannot_be_used_say_why(here, frames):
    pytest.importorskip("av")
    with pytest.raises(UsageError, match="does not exist"):
        open_source("nothing.mp4", package="sipmask")
    (here / "empty").mkdir()
    with pytest.raises(UsageError, match="has no images"):
        open_source("empty", package="sipmask")
    with pytest.raises(UsageError, match="is one image"):
        open_source(str(frames / "8.png"), package="sipmask")
    (here / "text.mp4").write_text("not a video")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_source("text.mp4", package="sipmask")
    with pytest.raises(MachineError, match="camera 97 cannot be opened"):
        open_source("97", package="sipmask")
    to_pil_image(torch.zeros(3, 9, 9, dtype=torch.uint8)).save(frames / "9.png")
    with pytest.raises(DatasetError, match="'9.png' of .* is 9 x 9 px"):
        list(open_source(str(frames), package="sipmask"))


def test_predict_track_is_the_same_as_track(here, frames, weights, capsys, monkeypatch):
    words = [str(frames), "--weights", str(weights), "--score-thr", "0.0", "--stride", "2", "--device", "cpu"]
    assert main(METHOD, "track", ["-q", *words, "--output", "first"]) == 0
    monkeypatch.setattr("sys.argv", ["sipmask", "predict", *words, "--track"])
    opened = []
    monkeypatch.setattr("onestage.cli.predict.viewer", lambda: "")
    monkeypatch.setattr("onestage.cli.predict.show", opened.append)
    code = main(METHOD, "predict", ["-q", *words, "--track", "--show", "--json", "--output", "second"])
    assert code == 0
    result = json.loads(capsys.readouterr().out.strip())
    assert (result["frames"], result["run"], opened) == (3, "second", [[Path("second/tracked.mp4")]])
    for name in ("tracks.jsonl", "results.json"):
        assert Path("first", name).read_text() == Path("second", name).read_text()
    command = json.loads(Path("second/environment.json").read_text())["command"]
    assert command.split() == ["python", "-m", "sipmask.track", *words]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["clip", "--classes", "ring"], "--track has no use for --classes"),
        (["clip", "--mask-format", "png"], "--track has no use for --mask-format"),
        (["clip", "other"], "--track follows objects through one video, and 2 are named"),
        ([], "no SOURCE"),
    ],
)
def test_predict_track_refuses_what_tracking_does_not_know(here, capsys, words, what):
    assert main(METHOD, "predict", ["--weights", "x.safetensors", "--track", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {what}\n  fix: ")
    assert err.count("\n") == 2


def test_weights_of_an_image_model_are_refused(here, frames, capsys):
    from dataclasses import asdict

    config = replace(SMALL, num_classes=3)
    info = WeightsInfo(package="sipmask", config=asdict(config), categories=CATEGORIES)
    save_weights(here / "image.safetensors", METHOD.build(config).state_dict(), info)
    assert track(frames, "--weights", "image.safetensors") == 4
    assert "are of an image model" in capsys.readouterr().err


def test_an_interruption_keeps_everything_up_to_that_frame(here, frames, weights, monkeypatch):
    add = TrackFiles.add

    def add_and_interrupt(self, frame):
        add(self, frame)
        if frame.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrackFiles, "add", add_and_interrupt)
    with pytest.raises(SystemExit) as left:
        track(frames, "--weights", weights, "--score-thr", 0, "--output", "out")
    assert left.value.code == 130
    assert json.loads((here / "out/tracks.json").read_text())["num_frames"] == 2
    assert all(len(entry["segmentations"]) == 2 for entry in json.loads((here / "out/results.json").read_text()))


def test_a_frame_that_breaks_keeps_those_before(here, frames, weights, capsys):
    (frames / "10.png").write_bytes(b"broken")
    assert track(frames, "--weights", weights, "--output", "out") == 3
    assert "cannot be read" in capsys.readouterr().err
    assert json.loads((here / "out/tracks.json").read_text())["num_frames"] == 2


def test_memory_does_not_grow_with_the_video(tmp_path, weights):
    """300 frames with new objects all the time: as many bytes in tensors and in Python as after two hundred."""
    predictor = Predictor.from_weights(weights, score_threshold=0.0)
    config = predictor.model.config  # all look alike, and where something was before, something new is found
    predictor.model.config = replace(config, association=replace(config.association, iou_weight=-1000.0))
    torch.nn.init.zeros_(predictor.model.head.tracking.mix.weight)
    torch.nn.init.zeros_(predictor.model.head.tracking.mix.bias)
    clips = ClipsDataset(10, size=SIZE, num_frames=2)
    images = [clips.frame(index, number) for index in range(10) for number in range(2)]
    files = TrackFiles(tmp_path, predictor.categories)
    trackers = []
    make = predictor.model.tracker
    predictor.model.tracker = lambda **limits: trackers.append(make(**limits)) or trackers[-1]
    held = []
    tracemalloc.start()
    for frame in follow(itertools.cycle(images), predictor, max_age=5, max_tracks=8, limit=301):
        files.add(frame)
        assert len(trackers[0].memory) <= 8
        if frame.number in (200, 300):  # the same picture; Python's and torch's free lists are full by then
            gc.collect()
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
            held.append((sum(one.nbytes for one in tensors), tracemalloc.get_traced_memory()[0]))
            del tensors
    tracemalloc.stop()
    assert files.finish({}) > 100
    (tensors, python), (tensors_later, python_later) = held
    assert abs(tensors_later - tensors) < 20_000  # two frames are 24 576
    assert python_later - python < 40_000  # a line of JSON for each object would be 80 000


def test_tracks_on_disk_are_those_in_memory_whatever_their_order(tmp_path):
    from onestage.engine.predict import Result
    from onestage.structures import Detections
    from sipmask.following import TrackedFrame

    files = TrackFiles(tmp_path, CATEGORIES)
    for number, (ids, labels) in enumerate((([4, 1], [2, 0]), ([], []), ([1], [1]), ([1, 4], [1, 2]))):
        masks = torch.zeros(len(ids), 6, 8)
        masks[:, number] = 1
        parts = torch.zeros(len(ids), 4), torch.full((len(ids),), 0.5), torch.tensor(labels, dtype=torch.int64)
        found = Detections((6, 8), *parts, Masks.from_bool(masks), track_ids=torch.tensor(ids, dtype=torch.int64))
        files.add(TrackedFrame(number, torch.zeros(3, 6, 8, dtype=torch.uint8), Result(found, CATEGORIES)))
    assert files.finish({"source": "x"}) == 2
    first, second = json.loads((tmp_path / "tracks.json").read_text())["tracks"]
    assert (first["id"], first["category"], first["first_frame"], first["last_frame"]) == (1, "star", 0, 3)
    assert [frame["frame"] for frame in second["frames"]] == [0, 3]
    dataset = ClipsDataset(1)
    dataset.videos, dataset.categories = (Video(1, (6, 8), 4, 1),), CATEGORIES
    check_video_results(json.loads((tmp_path / "results.json").read_text()), dataset, "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "tracks.json", "tracks.jsonl"]
