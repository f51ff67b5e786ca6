import inspect
import json
from dataclasses import asdict, fields, replace

import pytest

from meinst.config import IMPLICIT, NO_ENCODING, R50, R50_DCN, R50_DCN_3X, R50_LK, VARIANTS, X101, MEInstConfig
from onestage.config import config_from_dict
from onestage.errors import UsageError


def test_the_plain_model_of_the_paper_is_the_default():
    assert MEInstConfig() == R50 == VARIANTS["r50"]
    assert (R50.code_length, R50.mask_size, R50.num_codes) == (60, 28, 60)
    assert R50.deformable == "none"
    assert R50.level_ranges == ((-1.0, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))


def test_ablations_differ_in_one_thing():
    assert (R50_DCN.deformable, R50_DCN.modulated) == ("last", False)
    assert R50_LK.large_kernel == 9
    assert IMPLICIT.loss_on_mask
    assert NO_ENCODING.num_codes == 784


@pytest.mark.parametrize("side", [8, -9])
def test_a_large_kernel_that_would_move_or_enlarge_the_map_is_refused(side):
    with pytest.raises(UsageError, match=f"large_kernel is {side}"):
        replace(R50, large_kernel=side)


def test_long_training_is_multi_scale_with_the_usual_warm_up():
    assert (R50_DCN_3X.schedule.length, R50_DCN_3X.schedule.milestones) == (270_000, (180_000, 240_000))
    assert [short for short, _ in R50_DCN_3X.input.train_sizes] == [640, 672, 704, 736, 768, 800]
    assert (R50_DCN_3X.schedule.warmup, R50_DCN_3X.schedule.warmup_steps) == ("linear", 1000)


def test_trunks_get_the_pixels_they_were_trained_on():
    assert R50.input.channel_order == X101.input.channel_order == "bgr"
    assert R50.input.mean == X101.input.mean == (103.53, 116.28, 123.675)
    assert R50.input.std == (1.0, 1.0, 1.0)
    assert X101.input.std == (57.375, 57.12, 58.395)
    assert R50.backbone.stride_in_1x1
    assert not X101.backbone.stride_in_1x1


@pytest.mark.parametrize(("name", "config"), VARIANTS.items())
def test_each_variant_is_its_own_and_comes_back_from_json(name, config):
    assert config_from_dict(MEInstConfig, json.loads(json.dumps(asdict(config)))) == config
    assert [other for other, value in VARIANTS.items() if value == config] == [name]


def test_a_field_has_a_reason_or_a_plain_name():
    plain = {"num_classes", "backbone", "input", "inference", "schedule", "focal_alpha", "focal_gamma", "box_loss"}
    lines = {line.split(":")[0].strip(): line for line in inspect.getsource(MEInstConfig).splitlines() if ": " in line}
    assert not [f.name for f in fields(MEInstConfig) if f.name not in plain and "  # " not in lines[f.name]]
