"""Optimiser, per-parameter rules and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from onestage.config import ScheduleConfig

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)

ONECYCLE_RISE = 0.3  # share of the steps on the way up; with the next two, torch's OneCycleLR defaults
ONECYCLE_START = 25.0  # peak / first learning rate
ONECYCLE_END = 1e4  # first / last learning rate
PLATEAU_PATIENCE = 2  # epochs without improvement until the learning rate drops
PLATEAU_IMPROVEMENT = 1e-4  # of the epoch's mean training loss


def make_optimizer(model: nn.Module, config: ScheduleConfig) -> torch.optim.Optimizer:
    """The config's optimiser over `parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, config: ScheduleConfig) -> list[dict[str, object]]:
    """What learns, grouped by rule; each group carries its `lr_factor` and `weight_decay`.

    Norm layers follow `norm_decay`; every other parameter whose name ends in `.bias`, and the norm parameters that
    `bias_rule_also` names, follow `bias_lr_factor` and `bias_decay`.
    """
    norm = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, NORM_LAYERS)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_norm = name in norm and name not in config.bias_rule_also
        is_bias = not is_norm and name.rpartition(".")[2] == "bias"
        decays = config.norm_decay if is_norm else config.bias_decay if is_bias else True
        rule = (config.bias_lr_factor if is_bias else 1.0, config.weight_decay if decays else 0.0)
        groups.setdefault(rule, []).append(parameter)
    return [
        {"params": parameters, "lr_factor": lr_factor, "weight_decay": weight_decay}
        for (lr_factor, weight_decay), parameters in groups.items()
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def lr_at(step: int, steps_per_epoch: float, config: ScheduleConfig) -> float:
    """Learning rate of update `step` (0-based), before per-parameter factors and the plateau's.

    Args:
        step: Updates done before.
        steps_per_epoch: Need not be whole where accumulation crosses the end of an epoch.
        config: The schedule.
    """
    total = total_steps(config, steps_per_epoch)
    lr = config.lr
    if config.policy == "step":
        unit = steps_per_epoch if config.unit == "epochs" else 1
        lr *= config.gamma ** sum(step >= round(milestone * unit) for milestone in config.milestones)
    elif config.policy == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
    elif config.policy == "onecycle":
        lr = _onecycle(step, total, lr)
    if config.warmup != "none" and step < config.warmup_steps:
        ramp = step / config.warmup_steps if config.warmup == "linear" else 0.0
        lr *= config.warmup_factor + (1 - config.warmup_factor) * ramp
    return lr


def total_steps(config: ScheduleConfig, steps_per_epoch: float) -> int:
    """Updates of the whole schedule, at least one."""
    return max(1, round(config.length * (steps_per_epoch if config.unit == "epochs" else 1)))


@dataclass
class Plateau:
    """Learning-rate factor that falls when an epoch's mean training loss stops improving."""

    factor: float = 1.0
    best: float = math.inf
    stale_epochs: int = 0

    def observe(self, loss: float, gamma: float) -> None:
        """Takes the mean training loss of the epoch that ended."""
        if loss < self.best - PLATEAU_IMPROVEMENT:
            self.best, self.stale_epochs = loss, 0
            return
        self.stale_epochs += 1
        if self.stale_epochs >= PLATEAU_PATIENCE:
            self.factor *= gamma
            self.stale_epochs = 0


def _onecycle(step: int, total: int, peak: float) -> float:
    """torch's OneCycleLR with cosine arms; momentum stays as it is."""
    first = peak / ONECYCLE_START
    top, last = ONECYCLE_RISE * total - 1, total - 1
    if step <= top:
        return _cosine_between(first, peak, step / top)
    return _cosine_between(peak, first / ONECYCLE_END, min((step - top) / max(last - top, 1), 1.0))


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
