import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from onestage.config import ScheduleConfig, rescaled
from onestage.engine.schedule import Plateau, lr_at, make_optimizer, parameter_groups, set_lr, total_steps


class TowerOfThree(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.aligned_norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def rules_by_name(model, config):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_factor"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


def test_step_schedule_by_hand():
    config = ScheduleConfig(lr=1.0, length=12, milestones=(8, 11), gamma=0.1)
    rates = [lr_at(step, 10, config) for step in (0, 79, 80, 109, 110, 119)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert total_steps(config, 10) == 120


def test_step_schedule_counts_steps_when_told():
    config = ScheduleConfig(lr=1.0, unit="steps", length=90, milestones=(60, 80))
    assert [lr_at(step, 7, config) for step in (59, 60, 80)] == pytest.approx([1, 0.1, 0.01])
    assert total_steps(config, 7) == 90


def test_constant_warmup_is_a_third_until_it_ends():
    config = ScheduleConfig(lr=0.01, warmup="constant", warmup_steps=500, warmup_factor=1 / 3)
    assert [lr_at(step, 1000, config) for step in (0, 499, 500)] == pytest.approx([0.01 / 3, 0.01 / 3, 0.01])


def test_linear_warmup_rises_from_its_factor():
    config = ScheduleConfig(lr=0.9, warmup="linear", warmup_steps=100, warmup_factor=1 / 3)
    assert [lr_at(step, 1000, config) for step in (0, 50, 100)] == pytest.approx([0.3, 0.6, 0.9])


def test_cosine_by_hand():
    config = ScheduleConfig(lr=2.0, unit="steps", length=100, policy="cosine")
    assert [lr_at(step, 1, config) for step in (0, 50, 100)] == pytest.approx([2, 1, 0], abs=1e-12)


def test_onecycle_agrees_with_torch():
    config = ScheduleConfig(lr=2e-3, unit="steps", length=80, policy="onecycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=80, cycle_momentum=False)
    expected = []
    for _ in range(80):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 80:
            schedule.step()
    assert [lr_at(step, 1, config) for step in range(80)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("policy", ["step", "onecycle", "cosine", "constant", "plateau"])
def test_very_short_schedules_have_finite_rates(policy, length):
    config = ScheduleConfig(lr=1.0, unit="steps", length=length, policy=policy)
    assert all(0 <= lr_at(step, 1, config) <= 1 and math.isfinite(lr_at(step, 1, config)) for step in range(length))


def test_plateau_drops_after_two_epochs_without_improvement():
    plateau = Plateau()
    factors = []
    for loss in (1.0, 0.5, 0.49995, 0.5, 0.4, 0.4, 0.4):
        plateau.observe(loss, gamma=0.1)
        factors.append(plateau.factor)
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_bias_rule_leaves_norm_layers_alone():
    config = ScheduleConfig(weight_decay=1e-4, bias_lr_factor=2.0, bias_decay=False)
    assert rules_by_name(TowerOfThree(), config) == {
        "conv.weight": (1.0, 1e-4),
        "conv.bias": (2.0, 0.0),
        "norm.weight": (1.0, 1e-4),
        "norm.bias": (1.0, 1e-4),
        "aligned_norm.weight": (1.0, 1e-4),
        "aligned_norm.bias": (1.0, 1e-4),
        "scale": (1.0, 1e-4),
    }


def test_bias_rule_also_catches_a_named_norm_bias():
    config = ScheduleConfig(bias_lr_factor=2.0, bias_decay=False, bias_rule_also=("aligned_norm.bias",))
    rules = rules_by_name(TowerOfThree(), config)
    assert rules["aligned_norm.bias"] == (2.0, 0.0)
    assert rules["aligned_norm.weight"] == rules["norm.bias"] == (1.0, 1e-4)


def test_norm_layers_without_decay():
    rules = rules_by_name(TowerOfThree(), ScheduleConfig(norm_decay=False))
    assert rules["norm.weight"] == rules["norm.bias"] == (1.0, 0.0)
    assert rules["conv.bias"] == (1.0, 1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_groups_get_their_share_of_the_rate(kind):
    optimizer = make_optimizer(TowerOfThree(), ScheduleConfig(optimizer=kind, bias_lr_factor=2.0))
    set_lr(optimizer, 0.5)
    assert {group["lr"] / group["lr_factor"] for group in optimizer.param_groups} == {0.5}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 1.0}
    assert type(optimizer).__name__.lower() == kind


def test_rescaling_keeps_the_images_seen():
    config = ScheduleConfig(lr=0.01, batch_size=16, unit="steps", length=90, milestones=(60, 80), warmup_steps=8)
    half = rescaled(config, 8)
    assert (half.lr, half.length, half.milestones, half.warmup_steps) == (0.005, 180, (120, 160), 16)
    assert rescaled(replace(config, unit="epochs", length=12, milestones=(8, 11)), 2).length == 12
    assert rescaled(replace(config, optimizer="adamw"), 4).lr == pytest.approx(0.005)
