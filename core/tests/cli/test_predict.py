import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from onestage.cli.app import main
from onestage.cli.predict import _labels, find_sources
from onestage.data.clips import ClipsDataset
from onestage.data.coco import CocoDataset
from onestage.data.frames import VideoWriter, _files_of, is_camera
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.engine.predict import Predictor, Result
from onestage.errors import UsageError


def photo(path: Path, size=(40, 30), seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def weights(method, here):
    from dataclasses import asdict, replace

    torch.manual_seed(0)
    config = replace(method.variants["small"], num_classes=3)
    info = WeightsInfo(
        package="onestage", variant="small", config=asdict(config), categories=((7, "cat"), (9, "dog"), (30, "cow"))
    )
    save_weights(here / "toy.safetensors", method.build(config).state_dict(), info)
    return here / "toy.safetensors"


def names(words):
    return [(source.path.name, source.name) for source in find_sources(words)]


def test_sources_are_files_folders_and_patterns_each_once(here):
    for name in ("a.jpg", "sub/b.PNG", "sub/deep/c.jpg", "a.png"):
        photo(here / "in" / name)
    (here / "in" / "notes.txt").write_text("no image")
    assert names(["in"]) == [("a.jpg", "a"), ("a.png", "a-2"), ("b.PNG", "sub/b"), ("c.jpg", "sub/deep/c")]
    assert names(["in/a.jpg", "in/*.jpg", "in/a.jpg"]) == [("a.jpg", "a")]


def test_links_are_followed_once_and_hidden_files_left_out(here):
    for name in ("in/b.jpg", "in/._b.jpg", "in/.thumbs/b.jpg", "elsewhere/c.jpg"):
        photo(here / name)
    (here / "in/link").symlink_to(here / "elsewhere")
    (here / "elsewhere/back").symlink_to(here / "in")
    assert names(["in"]) == [("b.jpg", "b"), ("c.jpg", "link/c")]
    assert names(["in/._b.jpg"]) == [("._b.jpg", "._b")]


def test_a_file_is_one_source_however_its_path_is_written(here):
    photo(here / "in/a.jpg")
    assert names(["in/a.jpg", str(here / "in/a.jpg"), "in/../in/a.jpg"]) == [("a.jpg", "a")]


def test_numbers_in_names_are_those_with_digits(here):
    for name in ("10.jpg", "9.jpg", "²1.jpg"):
        photo(here / "in" / name)
    assert [path.name for path in _files_of(here / "in")] == ["9.jpg", "10.jpg", "²1.jpg"]
    assert not is_camera("²")


def test_a_category_name_may_occur_twice():
    assert _labels([(1, "cup"), (2, "cat"), (3, "cup")], ["cup"]).tolist() == [0, 2]


def test_sources_can_come_from_stdin(here, monkeypatch):
    photo(here / "a.jpg")
    monkeypatch.setattr("sys.stdin", io.StringIO("a.jpg\n\n"))
    assert names(["-"]) == [("a.jpg", "a")]


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("nothing.jpg", "SOURCE 'nothing.jpg' does not exist"),
        ("*.jpg", "SOURCE '*.jpg' matches no image"),
        ("clip.mp4", "SOURCE 'clip.mp4' is a video, and not the only SOURCE"),
        (".", "SOURCE '.' has no images"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(here, word, what):
    with pytest.raises(UsageError) as caught:
        find_sources([word])
    assert caught.value.what == what


def test_pictures_json_and_masks_are_written_and_agree_with_the_api(call, here, weights, method):
    photo(here / "in" / "a.jpg")
    photo(here / "in" / "b.png", seed=1)
    code, out, _ = call(
        "predict", "in", "--weights", weights, "--score-thr", "0", "--save", "image", "json", "masks", "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert (result["images"], result["instances"]) == (2, 6)
    run = Path(result["run"])
    with Image.open(run / "images" / "a.jpg") as picture:
        assert picture.size == (40, 30)
    assert len(list((run / "masks" / "b").glob("*.png"))) == 3

    truth = COCO(result["json"])
    assert [c["name"] for c in truth.loadCats(truth.getCatIds())] == ["cat", "dog", "cow"]
    predictor = Predictor.from_weights(weights, method=method, score_threshold=0.0)
    for image in truth.loadImgs(truth.getImgIds()):
        expected = predictor(image["file_name"])
        entries = truth.loadAnns(truth.getAnnIds(imgIds=image["id"]))
        assert [e["category_id"] for e in entries] == expected.category_ids
        assert [e["segmentation"] for e in entries] == expected.rle
        for entry, mask in zip(entries, expected.masks.to_bool(), strict=True):
            assert np.array_equal(truth.annToMask(entry), mask.numpy())
            assert entry["area"] == int(mask.sum())


def test_classes_and_polygons(call, here, weights):
    photo(here / "a.jpg")
    _, out, _ = call("predict a.jpg --weights toy.safetensors --score-thr 0 --classes dog --mask-format polygon --json")
    annotations = json.loads(Path(json.loads(out)["json"]).read_text())["annotations"]
    assert [entry["category_id"] for entry in annotations] == [9]
    assert len(annotations[0]["segmentation"][0]) >= 6
    code, _, err = call("predict a.jpg --weights toy.safetensors --classes horse")
    assert code == 2
    assert err.startswith("error: --classes: the weights do not know horse\n  fix: they know cat, dog, cow")


def test_names_may_be_as_long_as_names_can_be(call, here, weights):
    photo(here / "in" / f"{'a' * 251}.png")
    assert call("predict in --weights toy.safetensors --output out --save image masks --score-thr 0")[0] == 0
    assert (here / "out/images" / f"{'a' * 251}.jpg").is_file()
    assert len(list((here / "out/masks" / ("a" * 251)).iterdir())) == 3


def test_what_is_written_of_empty_masks_loads(call, here, weights):
    photo(here / "a.png", size=(1, 1))
    assert call("predict a.png --weights toy.safetensors --score-thr 0 --mask-format polygon --output out")[0] == 0
    dataset = CocoDataset(here / "out/predictions.json", here)
    assert len(dataset.coco_gt().anns) == 3
    assert len(dataset[0][1]) == 0


def test_shards_share_the_images_and_one_folder(call, here, weights):
    for number in range(5):
        photo(here / "in" / f"{number}.jpg")
    for index in range(2):
        code, out, _ = call(
            "predict",
            "in",
            "--weights",
            weights,
            "--output",
            "out",
            "--shard",
            f"{index}/2",
            "--save",
            "json",
            "--json",
        )
        assert code == 0
        assert json.loads(out)["images"] == (3, 2)[index]
    files = [
        image["file_name"]
        for name in ("predictions-0-of-2.json", "predictions-1-of-2.json")
        for image in json.loads((here / "out" / name).read_text())["images"]
    ]
    assert sorted(files) == [f"in/{number}.jpg" for number in range(5)]
    assert call("predict", "in", "--weights", weights, "--shard", "2/2")[0] == 2


def test_shards_share_what_limit_and_stride_leave(call, here, weights):
    for number in range(9):
        photo(here / "in" / f"{number}.jpg")
    files = []
    for index in range(2):
        words = f"--limit 3 --stride 2 --shard {index}/2 --output {index} --save json"
        assert call(f"predict in --weights toy.safetensors {words}")[0] == 0
        content = json.loads((here / f"{index}/predictions-{index}-of-2.json").read_text())
        files.append([image["file_name"] for image in content["images"]])
    assert files == [["in/0.jpg", "in/4.jpg"], ["in/2.jpg"]]


def test_skip_existing_goes_on_where_an_earlier_run_stopped(call, here, weights):
    photo(here / "in" / "a.jpg")
    words = ["predict", "in", "--weights", weights, "--output", "out", "--score-thr", "0", "--json"]
    call(*words)
    assert call(*words)[0] == 2  # not empty
    photo(here / "in" / "b.jpg")
    _, out, _ = call(*words, "--skip-existing")
    assert (json.loads(out)["images"], json.loads(out)["skipped"]) == (1, 1)
    content = json.loads((here / "out" / "predictions.json").read_text())
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert len({entry["id"] for entry in content["annotations"]}) == 6


@pytest.mark.parametrize("change", [{"categories": []}, {"annotations": None}])
def test_skip_existing_refuses_predictions_of_something_else(call, here, weights, change):
    photo(here / "in" / "a.jpg")
    words = ["predict", "in", "--weights", weights, "--output", "out", "--score-thr", "0"]
    call(*words)
    file = here / "out/predictions.json"
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    photo(here / "in" / "b.jpg")
    code, _, err = call(*words, "--skip-existing")
    assert code == 3
    assert "is not what predict wrote with these weights" in err


def predict_and_stop(method, words, number, signal_number):
    """A prediction that gets a signal while it looks at a certain image."""
    seen = []

    def stopped(self, image):
        seen.append(image)
        if len(seen) == number:
            os.kill(os.getpid(), signal_number)
        return predict(self, image)

    predict, Predictor.__call__ = Predictor.__call__, stopped
    raise SystemExit(main(method, "predict", shlex.split(words)))


def written(folder):
    """The data set that was written, and the other files with their contents."""
    paths = [path for path in folder.rglob("*.*g") if not any(part.startswith(".") for part in path.parts)]
    files = {path: path.read_bytes() for path in paths}
    content = json.loads((folder / "predictions.json").read_text()) if (folder / "predictions.json").exists() else None
    return content, {str(path.relative_to(folder)): data for path, data in files.items()}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("save", ["json", "image", "masks", "image json masks"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_prediction_that_was_stopped_keeps_what_it_found_and_goes_on(
    call, here, weights, method, fork, monkeypatch, save, number, code
):
    from onestage.cli import predict as verb

    monkeypatch.setattr(verb, "WRITE_EVERY", 2)
    for name in ("a", "b", "c/d", "c", "e", "f"):
        photo(here / "in" / f"{name}.png", seed=ord(name[-1]))
    words = f"in --weights {weights} --score-thr 0 --device cpu --save {save}"
    assert call(f"predict {words} --output whole")[0] == 0
    assert fork(predict_and_stop, method, f"{words} --output out", 4, number) == [code]
    assert not (here / "out" / "error.json").exists()
    done = {"json": 2, "image": 3, "masks": 3, "image json masks": 2}[save] if code < 0 else 4
    _, out, _ = call(f"predict {words} --output out --skip-existing --json")
    assert (json.loads(out)["skipped"], json.loads(out)["images"]) == (done, 6 - done)
    assert written(here / "out") == written(here / "whole")
    _, out, _ = call(f"predict {words} --output out --skip-existing --json")
    assert (json.loads(out)["skipped"], json.loads(out)["images"]) == (6, 0)


@pytest.mark.parametrize(("saved_as", "fails_at", "files"), [("image", 1, 1), ("masks", 2, 3)])
def test_files_that_were_cut_short_are_not_taken_for_done(call, here, weights, monkeypatch, saved_as, fails_at, files):
    photo(here / "in" / "a.png")
    words = f"predict in --weights {weights} --score-thr 0 --output out --save {saved_as} --skip-existing --json"
    save, saved = Image.Image.save, []

    def fail(self, path, *arguments, **more):
        saved.append(path)
        if len(saved) == fails_at:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, path, *arguments, **more)

    monkeypatch.setattr(Image.Image, "save", fail)
    assert call(words)[0] == 130
    assert written(here / "out")[1] == {}
    _, out, _ = call(words)
    assert json.loads(out)["images"] == 1
    assert len(written(here / "out")[1]) == files


def test_pictures_that_are_missing_are_made_and_the_json_stays(call, here, weights):
    for name in ("a", "b"):
        photo(here / "in" / f"{name}.png", seed=ord(name))
    words = f"predict in --weights {weights} --score-thr 0 --output out --skip-existing --json --save"
    assert call(f"{words} json")[0] == 0
    content = written(here / "out")[0]
    assert json.loads(call(f"{words} image json")[1])["images"] == 2
    assert written(here / "out")[0] == content
    assert sorted(written(here / "out")[1]) == ["images/a.jpg", "images/b.jpg"]


def test_a_prediction_is_written_now_and_then_and_seldom_when_there_are_many(tmp_path, monkeypatch):
    from onestage.cli import predict as verb
    from onestage.structures import Detections

    sizes = []
    monkeypatch.setattr(verb, "write_atomically", lambda path, data: sizes.append(len(json.loads(data)["images"])))
    book = verb._Book(tmp_path / "p.json", [(1, "cat")], polygons=False)
    none = Result(Detections((2, 2), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)), ())
    for number in range(2100):
        book.add(verb.Source(Path(f"{number}.jpg"), str(number)), torch.zeros(3, 2, 2), none)
    assert sizes[:3] == [100, 200, 300]
    assert sizes[-2:] == [1771, 1948]


def test_one_broken_image_among_others_is_named_after_the_others_are_done(call, here, weights):
    photo(here / "in" / "a.jpg")
    (here / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    code, _, err = call("predict", "in", "--weights", weights, "--output", "out")
    assert code == 3
    assert "error: 1 of 2 images could not be read: in/broken.jpg" in err
    assert (here / "out" / "images" / "a.jpg").exists()
    assert json.loads((here / "out" / "error.json").read_text())["exit_code"] == 3


@pytest.mark.parametrize("folder", ["images", "masks/deep"])
def test_photos_that_would_be_drawn_over_are_refused(call, here, weights, folder):
    path = photo(here / "data" / folder / "a.jpg")
    before = path.read_bytes()
    code, _, err = call("predict", "data", "--weights", "toy.safetensors", "--output", "data", "--overwrite")
    assert code == 2
    assert "gets its pictures" in err
    assert path.read_bytes() == before


def test_weights_are_asked_for(call, here):
    photo(here / "a.jpg")
    code, _, err = call("predict", "a.jpg")
    assert code == 2
    assert err.startswith("error: --weights is missing\n  fix: python -m onestage.predict IMAGE --weights")


def test_dry_run_writes_nothing(call, here, weights):
    photo(here / "a.jpg")
    assert call("predict", "a.jpg", "--weights", weights, "--dry-run")[0] == 0
    assert not (here / "runs").exists()


NUM_FRAMES, VIDEO_SIZE = 5, (32, 48)


def clip(path: Path) -> Path:
    pytest.importorskip("av")
    writer = VideoWriter(path, VIDEO_SIZE, 10)
    frames = ClipsDataset(1, size=64, num_frames=NUM_FRAMES)
    for number in range(NUM_FRAMES):
        writer.write(frames.frame(0, number)[:, : VIDEO_SIZE[0], : VIDEO_SIZE[1]])
    writer.close()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_video_becomes_an_annotated_video_and_lines_of_json(call, here, weights, method):
    pictures = frames_of(clip(here / "clip.mp4"))
    code, out, _ = call("predict clip.mp4 --weights toy.safetensors --score-thr 0 --classes dog cow --json")
    assert code == 0
    result = json.loads(out)
    run = Path(result["run"])
    assert (result["frames"], result["instances"], result["interrupted"]) == (NUM_FRAMES, 2 * NUM_FRAMES, None)
    assert {path.name for path in run.iterdir()} >= {"predicted.mp4", "predictions.jsonl"}
    drawn = frames_of(run / "predicted.mp4")
    assert [frame.shape for frame in drawn] == [(*VIDEO_SIZE, 3)] * NUM_FRAMES
    assert np.abs(drawn[0].astype(int) - pictures[0]).mean() > 5  # masks and boxes
    lines = [json.loads(line) for line in Path(result["json"]).read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(NUM_FRAMES))
    predictor = Predictor.from_weights(weights, method=method, score_threshold=0.0)
    for line, picture in zip(lines, pictures, strict=True):
        expected = predictor(picture)
        assert [entry["category_id"] for entry in line["annotations"]] == [
            number for number in expected.category_ids if number in (9, 30)
        ]
        assert line["annotations"][0]["segmentation"] in expected.rle


def test_every_second_frame_of_a_video_as_pictures(call, here, weights):
    clip(here / "clip.mp4")
    code, out, _ = call("predict clip.mp4 --weights toy.safetensors --save image --stride 2 --limit 2 -q --json")
    assert code == 0
    assert json.loads(out)["frames"] == 2
    run = Path(json.loads(out)["run"])
    assert sorted(path.name for path in (run / "images").iterdir()) == ["000000.jpg", "000002.jpg"]
    assert not (run / "predictions.jsonl").exists()
    assert not (run / "predicted.mp4").exists()


def test_an_interrupted_video_keeps_what_was_found(call, here, weights, monkeypatch):
    clip(here / "clip.mp4")
    seen = []

    def interrupted(self, image):
        seen.append(image)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return predict(self, image)

    predict = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", interrupted)
    assert call("predict clip.mp4 --weights toy.safetensors --output out")[0] == 130
    assert len((here / "out/predictions.jsonl").read_text().splitlines()) == 3
    assert len(frames_of(here / "out/predicted.mp4")) == 3


def test_what_does_not_go_with_a_video_says_so(call, here, weights):
    photo(here / "a.jpg")
    assert call("predict a.jpg --weights toy.safetensors --save video")[0] == 2
    _, _, err = call("predict clip.mp4 --weights toy.safetensors --shard 0/2")
    assert err.startswith("error: --shard and --skip-existing are for images")
    _, _, err = call("predict 97 --weights toy.safetensors")
    assert "camera 97 cannot be opened" in err or "PyAV is not installed" in err


def test_without_pyav_a_video_says_what_to_install(call, here, weights, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "av", None)
    (here / "clip.mp4").write_bytes(b"x")
    code, _, err = call("predict clip.mp4 --weights toy.safetensors")
    assert code == 5
    assert err == (
        f"error: SOURCE 'clip.mp4' is a video and PyAV is not installed\n  fix: pip install './{method.name}[video]'\n"
    )


def test_a_package_that_does_not_track_says_so(call, here, weights):
    code, _, err = call("predict clip.mp4 --track", "--weights", weights)
    assert code == 2
    assert err.startswith("error: --track: onestage finds instances image by image, and cannot follow objects\n  fix: ")
    assert err.count("\n") == 2


@pytest.fixture
def screen(monkeypatch):
    """A machine with a display; the commands that open something on it are listed."""
    opened = []
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    popen = SimpleNamespace(Popen=lambda command, **_: opened.append(command), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("onestage.cli.show.subprocess", popen)
    return opened


def test_show_opens_the_pictures_or_the_folder_of_many(call, here, weights, screen):
    for number in range(6):
        photo(here / "in" / f"{number}.jpg", seed=number)
    words = ["--weights", weights, "--show", "--device", "cpu"]
    assert call("predict in/0.jpg in/1.jpg --output two", *words)[0] == 0
    pictures = [here / "two" / "images" / name for name in ("0.jpg", "1.jpg")]
    assert screen == [["/usr/bin/xdg-open", str(picture)] for picture in pictures]
    assert all(picture.is_file() for picture in pictures)
    screen.clear()
    assert call("predict in --output all", *words)[0] == 0
    assert screen == [["/usr/bin/xdg-open", str(here / "all" / "images")]]


def test_show_opens_a_video(call, here, weights, screen):
    clip(here / "clip.mp4")
    assert call("predict clip.mp4 --output out --show", "--weights", weights, "--device", "cpu")[0] == 0
    assert screen == [["/usr/bin/xdg-open", str(here / "out" / "predicted.mp4")]]


def test_show_without_display_viewer_or_pictures_ends_before_anything_is_read(call, here, weights, screen, monkeypatch):
    code, _, err = call("predict nothing.jpg --show --save json", "--weights", weights)
    assert (code, err.splitlines()[0]) == (2, "error: --show opens pictures, and --save leaves them out")
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, _, err = call("predict nothing.jpg --show", "--weights", weights)
    assert (code, err.splitlines()[0]) == (5, "error: --show needs 'xdg-open', which is not installed")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    code, _, err = call("predict nothing.jpg --show", "--weights", weights)
    assert code == 5
    assert err.startswith("error: --show needs a display, and there is none")
    assert err.count("\n") == 2
    assert not Path("runs").exists()
