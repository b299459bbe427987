"""Which parameters train, with what decay and learning rate, and how the learning rate moves."""

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from threetowers.config import OptimConfig
from threetowers.errors import UsageError

LOGITS = ("log_scale", "bias")
"""Parameters of the logits, beside those of towers and heads."""


def freeze(model: nn.Module, patterns: Iterable[str]) -> int:
    """Takes the parameters whose names match out of training; returns how many numbers they hold.

    Frozen also means no decay, no moments and no place in the optimiser. Raises UsageError for a pattern that
    matches nothing.
    """
    count = 0
    for pattern in patterns:
        for parameter in _matching(model, pattern, "optim.freeze"):
            count += parameter.numel() if parameter.requires_grad else 0
            parameter.requires_grad_(False)
    return count


def _matching(model: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    found = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
    if not found:
        names = [name for name, _ in model.named_parameters()]
        raise UsageError(
            f"{key}: {pattern!r} matches no parameter. The first of {len(names)}: {', '.join(names[:6])}"
        )
    return found


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups, each with the names of its parameters.

    Matrices and what has more dimensions decay; vectors, heads, what `no_decay` names and the scale do not. The scale
    and bias of the logits have the learning rate times `scale_lr_multiplier`, as `lr_multiplier` says for every group.
    """
    spared = {id(p) for pattern in config.no_decay for p in _matching(model, pattern, "optim.no_decay")}
    groups: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": config.weight_decay, "lr_multiplier": 1.0},
        "no_decay": {"weight_decay": 0.0, "lr_multiplier": 1.0},
        "scale": {"weight_decay": 0.0, "lr_multiplier": config.scale_lr_multiplier},
    }
    for group in groups.values():
        group |= {"params": [], "names": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in LOGITS:
            group = groups["scale"]
        elif not _is_matrix(parameter) or name.startswith("heads.") or id(parameter) in spared:
            group = groups["no_decay"]
        else:
            group = groups["decay"]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is more than a vector: gains [C, 1, 1, 1], class tokens [1, 1, D] and scalars are not."""
    return sum(size > 1 for size in parameter.shape) >= 2


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over everything that trains; raises UsageError when nothing does."""
    freeze(model, config.freeze)
    groups = parameter_groups(model, config)
    if not any(name not in LOGITS for group in groups for name in group["names"]):
        raise UsageError(
            "optim.freeze: every parameter of towers and heads is frozen, nothing is left to train; leave out a pattern"
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up over warmup_steps, then a cosine to zero at the last step; step counts from 0."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group, times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
