"""Building a model the way torchvision does."""

from dataclasses import asdict, dataclass, field

import pytest
from torch import nn
from torchvision.models import ResNet18_Weights

from onestage import builders
from onestage.builders import build_model, named_model
from onestage.config import BackboneConfig
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.errors import UsageError, WeightsError
from onestage.method import Method
from onestage.nn.resnet import build_backbone


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    num_classes: int = 80
    width: int = 8
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet18"))


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.backbone = config, build_backbone(config.backbone)


METHOD = Method(
    name="onestage",
    title="Toy",
    config_type=ToyConfig,
    variants={"toy": ToyConfig()},
    default_variant="toy",
    small_variant="toy",
    demo_variant="toy",
    build=Toy,
)


def test_torchvisions_arguments_are_taken(monkeypatch):
    seen = {}

    def load(trunk, source, *, progress):
        seen.update(source=source, progress=progress)

    monkeypatch.setattr(builders, "load_imagenet", load)
    weights = ResNet18_Weights.IMAGENET1K_V1
    model = named_model(
        METHOD, "toy", weights_backbone=weights, progress=False, num_classes=3, trainable_backbone_layers=3
    )
    assert seen == {"source": weights, "progress": False}
    assert (model.config.num_classes, model.config.backbone.frozen_stages, model.training) == (3, 2, False)


def test_an_unknown_argument_gets_the_nearest():
    with pytest.raises(UsageError) as caught:
        build_model(METHOD, ToyConfig(), num_class=3)
    assert caught.value.what == "unknown argument 'num_class'; nearest: 'num_classes'"
    with pytest.raises(UsageError, match="unknown argument 'widht'; nearest: 'width'"):
        build_model(METHOD, ToyConfig(), widht=3)
    assert build_model(METHOD, ToyConfig(), width=3).config.width == 3


def test_a_mistyped_head_and_no_classes_are_refused():
    with pytest.raises(UsageError, match="unknown head 'renit'; nearest: 'reinit'"):
        build_model(METHOD, ToyConfig(), head="renit")
    with pytest.raises(UsageError, match="num_classes is 0"):
        build_model(METHOD, ToyConfig(), num_classes=0)


def test_weights_of_another_number_of_categories_say_how_to_start_a_new_head(tmp_path):
    info = WeightsInfo(package="onestage", variant="toy", config=asdict(ToyConfig(num_classes=3)), categories=[])
    save_weights(tmp_path / "w.safetensors", Toy(ToyConfig()).state_dict(), info)
    with pytest.raises(WeightsError, match="know 3 categories, num_classes is 5") as caught:
        named_model(METHOD, "toy", weights=tmp_path / "w.safetensors", num_classes=5)
    assert 'head="reinit"' in caught.value.fix
    reinit = named_model(METHOD, "toy", weights=tmp_path / "w.safetensors", num_classes=5, head="reinit")
    assert reinit.config.num_classes == 5
