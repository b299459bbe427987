"""Which parameters train, with what decay and learning rate, and how the learning rate moves."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from threetowers.config import OptimConfig
from threetowers.errors import UsageError
from threetowers.train.shards import own_part

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


@dataclass(frozen=True)
class Rule:
    """What a rule of `optim.rules` says about the parameters that it matches; None where it says nothing.

    lr: a multiple of the learning rate. start: the step, counted from 0, up to which they stay as they are.
    """

    match: str
    lr: float | None = None
    start: int | None = None


def read_rule(text: str) -> Rule:
    """A rule as the configuration writes it; raises UsageError for any other text.

    >>> read_rule("img.trunk.* lr=0.05 from=200")
    Rule(match='img.trunk.*', lr=0.05, start=200)
    """
    match, *rest = text.split() or [""]
    given = dict(word.partition("=")[::2] for word in rest)
    try:
        lr = float(given.pop("lr")) if "lr" in given else None
        start = int(given.pop("from")) if "from" in given else None
    except ValueError:
        given = {"": ""}
    if given or not rest or len(rest) > 2 or not (0 <= (lr or 0.0) < math.inf and (start or 0) >= 0):
        raise UsageError(
            f"optim.rules: {text!r} is no rule. Write a pattern of parameter names, and lr=FACTOR, from=STEP or both "
            "behind it, such as 'img.trunk.* lr=0.05 from=200'"
        )
    return Rule(match, lr, start)


def parameter_groups(
    model: nn.Module, config: OptimConfig, started: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups, each with the names of its parameters, and these as this process holds them.

    Matrices and what has more dimensions decay; vectors, heads, what `no_decay` names and the scale do not. The scale
    and bias of the logits have the learning rate times `scale_lr_multiplier`; every group has its `lr_multiplier` and
    the step `from_step` from which it trains, which rules and `layer_decay` set for other parameters. started: the
    modules that start at given weights, and the multiple of the rate that these have where no rule gives another.
    Raises UsageError for a pattern that matches nothing.
    """
    spared = {id(p) for pattern in config.no_decay for p in _matching(model, pattern, "optim.no_decay")}
    lrs, starts = _layer_factors(model, config.layer_decay, started or {}), dict[str, int]()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_rule = {
        name: factor
        for module, factor in (started or {}).items()
        for name in named
        if name.startswith(f"{module}.")
    }
    for rule in map(read_rule, config.rules):
        found = [name for name in named if name not in LOGITS and fnmatchcase(name, rule.match)]
        if not found:
            raise UsageError(
                f"optim.rules: {rule.match!r} matches no parameter of a tower or head that trains. The first of "
                f"{len(named)}: {', '.join(list(named)[:6])}"
            )
        by_rule |= {} if rule.lr is None else dict.fromkeys(found, rule.lr)
        starts |= {} if rule.start is None else dict.fromkeys(found, rule.start)
    groups: dict[tuple[int, float, int], dict[str, Any]] = {}
    for name, parameter in named.items():
        factor = lrs.get(name, 1.0) * by_rule.get(name, 1.0)
        if name in LOGITS:
            kind, factor = 2, config.scale_lr_multiplier
        else:
            spare = not _is_matrix(parameter) or name.startswith("heads.") or id(parameter) in spared
            kind = 1 if spare else 0
        start = starts.get(name, 0)
        group = groups.setdefault(
            (kind, factor, start),
            {"weight_decay": 0.0 if kind else config.weight_decay, "lr_multiplier": factor, "from_step": start,
             "numbers": 0, "params": [], "names": []},
        )  # fmt: skip
        group["numbers"] += parameter.numel()
        group["params"].append(own_part(parameter))
        group["names"].append(name)
    return [
        groups[key] for key in sorted(groups, key=lambda key: key[0])
    ]  # with the order of names within a kind


def _layer_factors(model: nn.Module, decay: float, started: Mapping[str, float]) -> dict[str, float]:
    """The factor of the learning rate of each parameter in a layer of a started tower."""
    if decay == 1.0:
        return {}
    if not started:
        raise UsageError(
            "optim.layer_decay: it is for towers that start at given weights, and none does. Give start.image, "
            "start.text or pair.weights, or leave it out"
        )
    factors: dict[str, float] = {}
    for tower in dict.fromkeys(module.partition(".")[0] for module in started):
        layers = layers_of(model.get_submodule(tower))
        top = max(layers.values())
        factors |= {f"{tower}.{name}": decay ** (top - layer) for name, layer in layers.items()}
    return factors


def layers_of(tower: nn.Module) -> dict[str, int]:
    """The layer of each parameter of an open_clip tower, from 0 at the input; timm groups the layers of its networks.

    What follows the last layer counts as one more.
    """
    trunk = getattr(tower, "trunk", None)
    if trunk is not None:
        by_name = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
        layers = {f"trunk.{name}": int(layer) for name, layer in by_name.items()}
        return layers | {
            name: max(layers.values()) for name, _ in tower.named_parameters() if name not in layers
        }
    blocks = {
        name: int(found[1]) + 1
        for name, _ in tower.named_parameters()
        if (found := re.search(r"\b(?:resblocks|layers?)\.(\d+)\.", name))
    }
    below = (
        "conv1.", "class_embedding", "positional_embedding", "token_embedding", "ln_pre.", "cls_emb",
        "transformer.embeddings.",  # of an encoder of transformers
    )  # fmt: skip
    top = max(blocks.values(), default=0) + 1
    return {
        name: blocks.get(name, 0 if name.startswith(below) else top) for name, _ in tower.named_parameters()
    }


def describe_groups(optimizer: torch.optim.Optimizer, lr: float) -> list[dict[str, Any]]:
    """The resolved table of the optimiser as plain values: of each group its numbers, settings and names."""
    return [
        {
            "numbers": group["numbers"],
            "lr": lr * group["lr_multiplier"], "weight_decay": group["weight_decay"], "from_step": group["from_step"],
            "parameters": group["names"],
        }
        for group in optimizer.param_groups
    ]  # fmt: skip


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is more than a vector: gains [C, 1, 1, 1], class tokens [1, 1, D] and scalars are not."""
    return sum(size > 1 for size in parameter.shape) >= 2


def adamw(
    model: nn.Module, config: OptimConfig, started: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over everything that trains; started: as in `parameter_groups`. Raises UsageError when nothing trains."""
    freeze(model, config.freeze)
    groups = parameter_groups(model, config, started)
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Sets the rate of every group, times its multiplier; 0 before the step from which it trains."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"] if step >= group["from_step"] else 0.0
