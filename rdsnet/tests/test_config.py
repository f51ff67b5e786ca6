from dataclasses import asdict, replace

import pytest
import torch

import rdsnet
from onestage.config import config_from_dict
from onestage.errors import UsageError
from rdsnet.config import (
    R50,
    R101,
    R101_2X,
    R101_600,
    R101_600_DIRECT,
    R101_600_MBRM,
    RETINANET_R101,
    S_IE,
    S_PLAIN,
    S_TE,
    S_TE_IE,
    S_TE_OHEM,
    S_TE_OHEM_IE,
    VARIANTS,
    YOLACT,
    InferenceConfig,
    RDSNetConfig,
)
from rdsnet.method import METHOD, build


def test_the_released_r50_model_is_the_default():
    assert RDSNetConfig() == R50 == VARIANTS[METHOD.default_variant]
    assert (R50.schedule.lr, R50.schedule.batch_size, R50.schedule.clip_norm) == (0.005, 8, 35.0)
    assert (R50.train_crop, R50.ohem, R50.inference.crop_padding) == (0.25, 1.0, 0.1)


def test_long_training_draws_one_of_two_sizes():
    assert R101_2X.input.train_sizes == ((640, 1333), (800, 1333))
    assert R101_2X.input.train_draw == "choice"
    assert (R101_2X.schedule.length, R101_2X.schedule.milestones) == (24, (16, 22))


def test_table_2_and_4_are_one_network_under_other_names():
    for row, refine in ((R101_600, "none"), (R101_600_DIRECT, "direct"), (R101_600_MBRM, "mbrm")):
        assert row.inference.refine == refine
        assert replace(row, inference=InferenceConfig()) == R101_600
    assert replace(RETINANET_R101, norm="gn", masks="corr") == R101


def test_table_3_is_three_trained_networks_and_yolact():
    def training(config):
        return replace(config, inference=InferenceConfig())

    assert training(S_PLAIN) == training(S_IE)
    assert training(S_TE) == training(S_TE_IE)
    assert training(S_TE_OHEM) == training(S_TE_OHEM_IE)
    assert len({training(row) for row in (S_PLAIN, S_TE, S_TE_OHEM, YOLACT)}) == 4
    assert [row.inference.crop_padding for row in (S_PLAIN, S_IE, S_TE, S_TE_IE)] == [0.0, 0.1, 0.0, 0.1]
    assert [row.train_crop for row in (S_PLAIN, S_TE, S_TE_OHEM)] == [0.0, 0.25, 0.25]
    assert [row.ohem for row in (S_PLAIN, S_TE, S_TE_OHEM)] == [None, None, 1.0]
    assert VARIANTS["s"] == S_TE_OHEM_IE
    assert {row.input.augmentation for row in (YOLACT, S_PLAIN, S_TE, S_TE_OHEM)} == {"yolact"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_and_survives_json(name):
    config = VARIANTS[name]
    assert config_from_dict(RDSNetConfig, asdict(config)) == config
    with torch.device("meta"):
        assert build(config).config == config


@pytest.mark.parametrize(
    "changes",
    [
        {"masks": "lc"},
        {"detector": "yolact", "masks": "none"},
        {"masks": "none", "inference": InferenceConfig(refine="mbrm")},
        {"detector": "yolact", "inference": InferenceConfig(refine="direct")},
    ],
)
def test_what_does_not_go_together_is_refused(changes):
    with pytest.raises(UsageError):
        RDSNetConfig(**changes)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        small, large = build(R50), build(R101)
        # The published count has four biases less than convs with a norm would have.
        yolact = build(YOLACT)

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(small.backbone) == 23_508_032
    assert count(large.backbone) == 42_500_160
    assert count(small.fpn) == 7_997_440
    assert count(small.head, small.object_vectors) == 10_154_292
    assert count(small.pixel_vectors) == 2_959_904
    assert count(small.mbrm) == 10
    assert round(count(yolact) / 1e6, 2) == 50.16


def test_models_by_name():
    assert rdsnet.list_models() == list(VARIANTS)
    with pytest.raises(UsageError, match="no model 'r18'"):
        rdsnet.get_model("r18")
