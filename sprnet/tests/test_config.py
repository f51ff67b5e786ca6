import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from onestage.config import config_from_dict
from sprnet.config import R50_500, R50_800, VARIANTS, SPRNetConfig, input_of

ROWS = {name: config for name, config in VARIANTS.items() if name not in ("small", "demo")}


def test_the_gated_model_at_800_px_is_the_default():
    assert SPRNetConfig() == R50_800 == VARIANTS["r50_800"]
    assert (R50_800.gate, R50_800.fusion, R50_800.shortcut, R50_800.mask_iou) == ("full", "sec32", "add", 0.7)
    assert not R50_800.force_match
    assert not R50_800.gate_share_levels


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("r50_500_fpn", {"gate": "none"}),  # Tables 1 and 2b
        ("r50_800", {"input": input_of(800)}),
        ("c33x4", {"fusion": "c33x4"}),  # Table 2a
        ("c33_1246", {"fusion": "c33_1246"}),
        ("no_shortcut", {"shortcut": "none"}),  # Table 2c
        ("iou_half", {"mask_iou": 0.5}),  # Table 2d
        ("retinanet_500", {"masks": False}),  # Tables 2b, 5 and 6
        ("retinanet_500_fpn", {"masks": False, "gate": "none"}),
    ],
)
def test_rows_differ_by_one_switch_from_the_gated_model_at_500_px(row, change):
    assert VARIANTS[row] == replace(R50_500, **change)


@pytest.mark.parametrize("gate", ["", "_fpn"])
def test_boxes_alone_at_five_scales(gate):
    sizes = [VARIANTS[f"retinanet_{short}{gate}"].input.test_size for short in (400, 500, 600, 700, 800)]
    assert sizes == [(400, 667), (500, 833), (600, 1000), (700, 1167), (800, 1333)]


def test_trunks_of_tables_one_three_and_four():
    for row in ("r101_800", "r101_800_fpn", "retinanet_r101", "retinanet_r101_fpn"):
        assert VARIANTS[row].backbone.name == "resnet101"
        assert VARIANTS[row].input.test_size == (800, 1333)
        assert (VARIANTS[row].gate == "none") == row.endswith("fpn")


def test_every_row_is_trained_in_keras_retinanets_way():
    for config in ROWS.values():
        schedule = config.schedule
        assert (schedule.optimizer, schedule.lr, schedule.eps, schedule.weight_decay) == ("adam", 1e-5, 1e-7, 0.0)
        assert (schedule.clip_norm, schedule.batch_size, schedule.length) == (1e-3, 1, 25)
        assert (schedule.policy, schedule.unit, schedule.gamma) == ("plateau", "epochs", 0.1)
        assert config.input.augmentation == "none"
        assert config.input.train_sizes == (config.input.test_size,)
        assert (config.backbone.norm, config.backbone.frozen_stages) == ("frozen", 0)


def test_every_variant_is_itself_after_json():
    for config in VARIANTS.values():
        assert config_from_dict(SPRNetConfig, json.loads(json.dumps(asdict(config)))) == config
    assert len(set(VARIANTS.values())) == len(VARIANTS)


@pytest.mark.parametrize("module", ["sprnet", "sprnet.config", "sprnet.method"])
def test_reading_the_configuration_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
