from dataclasses import asdict, replace

import pytest
import torch

from onestage.engine.checkpoint import WeightsInfo, load_weights, save_weights
from onestage.errors import UsageError, WeightsError
from sipmask.config import DEMO, R50, VIDEO, VIDEO_SMALL, SipMaskConfig
from sipmask.model import SipMask
from sipmask.to_video import run, video_from_image


def _state(config: SipMaskConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return SipMask(config).state_dict()


def test_everything_but_the_tracking_branch_comes_from_the_image_model():
    state = _state(DEMO)
    model, notes = video_from_image(state, DEMO, VIDEO_SMALL)
    assert model.config.num_classes == DEMO.num_classes
    for name, value in model.state_dict().items():
        assert name.startswith("head.tracking.") or torch.equal(value, state[name])
    assert len(notes) == 1


def test_surplus_convs_of_deeper_towers_are_left_out():
    with torch.device("meta"):
        state = SipMask(R50).state_dict()
    _, notes = video_from_image({name: torch.zeros(value.shape) for name, value in state.items()}, R50, VIDEO)
    assert "head.cls_tower.2.0.weight" in notes[0]


@pytest.mark.parametrize(
    ("image", "message"), [(VIDEO_SMALL, "video model's already"), (replace(DEMO, width=32), "nothing that fits")]
)
def test_what_does_not_fit_is_refused(image, message):
    with pytest.raises(WeightsError, match=message):
        video_from_image(_state(image), image, VIDEO_SMALL)


def test_the_file_it_writes_is_a_video_model(tmp_path):
    source, target = tmp_path / "image.safetensors", tmp_path / "video.safetensors"
    names = ((1, "ring"), (2, "star"), (3, "heart"))
    save_weights(source, _state(DEMO), WeightsInfo(package="sipmask", config=asdict(DEMO), categories=names))
    words = [str(source), "--to", str(target), "--variant", "video_small", "--quiet"]
    assert run(words) == 0
    state, info = load_weights(target, package="sipmask")
    assert info.variant == "video_small"
    assert info.categories == names
    assert info.config["track_depth"] == 2
    assert "head.tracking.mix.weight" in state
    with pytest.raises(UsageError, match="exists"):
        run(words)
    with pytest.raises(UsageError, match="no video variant"):
        run([str(source), "--to", str(tmp_path / "x.safetensors"), "--variant", "r50"])
