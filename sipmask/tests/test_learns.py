from dataclasses import replace

import pytest
import torch

from onestage.data.synth import ShapesDataset
from onestage.engine.checkpoint import WeightsInfo
from onestage.engine.train import TrainOptions, train
from sipmask.config import DEMO
from sipmask.model import SipMask


@pytest.mark.slow
def test_two_generated_images_are_learned_by_heart(tmp_path):
    images = ShapesDataset(2, split="train", seed=3)
    config = replace(
        DEMO,
        input=replace(DEMO.input, augmentation="none"),
        schedule=replace(DEMO.schedule, batch_size=2, length=150),
    )
    torch.manual_seed(0)
    result = train(
        SipMask(config),
        config,
        images,
        images,
        TrainOptions(device="cpu", eval_every=0, save_every=0, progress=False),
        tmp_path,
        info=WeightsInfo(package="sipmask", categories=images.categories),
    )
    assert result.metrics["bbox/AP"] >= 0.9
    assert result.metrics["segm/AP50"] >= 0.9
