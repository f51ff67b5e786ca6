import inspect
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest

from onestage.config import config_from_dict
from sipmask.config import (
    ABLATION,
    R50,
    R50_RT_6X,
    R101_MS_6X,
    R101_PLUS_6X,
    R101_RT_6X,
    VARIANTS,
    VIDEO,
    VIDEO_MS,
    SipMaskConfig,
)


def test_the_full_model_is_the_default():
    assert SipMaskConfig() == R50 == VARIANTS["r50"]
    assert R50.grid == (2, 2)
    assert R50.num_coefficients == 128
    assert R50.basis_stride == 2


def test_the_ablation_baseline_has_none_of_the_papers_parts():
    assert ABLATION.num_coefficients == 32
    assert not ABLATION.align_features
    assert ABLATION.basis_levels == ("P3",)
    assert ABLATION.weighting == "none"


def test_real_time_models_are_shallow_and_trained_long():
    assert (R50_RT_6X.tower_depth, R50_RT_6X.norm, R50_RT_6X.inference.nms) == (2, "none", "fast")
    assert R50_RT_6X.input.test_size == (544, 544)
    assert (R50_RT_6X.schedule.length, R50_RT_6X.schedule.milestones) == (72, (60, 69))
    assert R101_MS_6X.schedule.length == 72


def test_plus_plus_is_the_real_time_model_with_two_parts_more():
    assert replace(R101_PLUS_6X, rescore=False, backbone=R101_RT_6X.backbone) == R101_RT_6X
    assert R101_PLUS_6X.backbone.deformable_interval == 3
    assert not R101_PLUS_6X.backbone.modulated


def test_video_models_find_ten_objects_a_frame_and_never_forget_them():
    assert [name for name, config in VARIANTS.items() if config.is_video] == ["video", "video_ms", "video_small"]
    assert (VIDEO.inference.max_detections, VIDEO.inference.score_threshold) == (10, 0.03)
    assert VIDEO.association.max_age is VIDEO.association.max_tracks is None
    assert replace(VIDEO_MS, input=VIDEO.input) == VIDEO


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_survive_json(name):
    stored = json.loads(json.dumps(asdict(VARIANTS[name])))
    assert config_from_dict(SipMaskConfig, stored) == VARIANTS[name]


def test_variants_differ_from_each_other():
    assert len(set(VARIANTS.values())) == len(VARIANTS)


def test_every_field_says_what_it_is():
    source = inspect.getsource(SipMaskConfig)
    block = source[: source.index("@property")]
    plain = {"num_classes", "backbone", "input", "inference", "schedule", "focal_alpha", "focal_gamma"}
    for field in fields(SipMaskConfig):
        if field.name not in plain:
            line = next(line for line in block.splitlines() if line.strip().startswith(f"{field.name}:"))
            assert "  # " in line, f"{field.name} has no unit, symbol or section"


def test_importing_the_config_does_not_load_torch():
    code = "import sys, sipmask, sipmask.config, sipmask.method; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
