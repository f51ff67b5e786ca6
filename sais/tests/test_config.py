import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from onestage.config import config_from_dict
from sais.config import AREA_AWARE, CENTER_AWARE, FCOS, KEEP_RATIO, R50_640, R50_768, VARIANTS, SAISConfig


def test_sais_768_is_the_default():
    assert SAISConfig() == R50_768 == VARIANTS["r50_768"]
    assert R50_768.center_aware
    assert R50_768.fuse
    assert (R50_768.input.resize, R50_768.input.test_size) == ("fixed", (768, 768))


def test_rows_differ_by_one_switch():
    assert replace(CENTER_AWARE, fuse=True) == R50_768  # Table III
    assert replace(AREA_AWARE, center_aware=True) == CENTER_AWARE  # Table II
    assert replace(AREA_AWARE, input=KEEP_RATIO) == VARIANTS["area_aware_keep_ratio"]  # Table I
    assert replace(FCOS, center_aware=True) == VARIANTS["fcos_center_aware"]
    assert not FCOS.masks
    assert replace(R50_640, input=R50_768.input) == R50_768  # Table IV


def test_trunks_of_table_four():
    names = [VARIANTS[row].backbone.name for row in ("r50_640", "r50_768", "r101_768", "x101_768")]
    assert names == ["resnet50", "resnet50", "resnet101", "resnext101_64x4d"]


def test_trained_in_twelve_epochs_without_augmentation_but_the_flip():
    for name, config in VARIANTS.items():
        if name not in ("small", "demo"):
            assert (config.schedule.length, config.schedule.milestones, config.schedule.lr) == (12, (8, 11), 0.01)
            assert config.input.augmentation == "flip"
            assert config.backbone.frozen_stages == 2


def test_every_variant_is_itself_after_json():
    for config in VARIANTS.values():
        assert config_from_dict(SAISConfig, json.loads(json.dumps(asdict(config)))) == config
    assert len(set(VARIANTS.values())) == len(VARIANTS)


@pytest.mark.parametrize("module", ["sais", "sais.config", "sais.method"])
def test_reading_the_configuration_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
