"""What a loader of frozen towers hands over, and the few things that every loader needs."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.data.transforms import ImageSpec
from threetowers.errors import CheckpointError, UsageError

# network, width P of its features, preprocessing, and open_clip's vision_cfg of the same network or None
Loaded = tuple[nn.Module, int, ImageSpec, dict[str, Any] | None]


def freeze(module: nn.Module, precision: str) -> None:
    """Eval mode, no gradients, channels last, and bf16 weights when the precision says so; in place."""
    dtype = torch.bfloat16 if precision == "bf16" else None  # fp32 leaves every tensor as it was loaded
    module.eval().requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def weights_digest(module: nn.Module) -> str:
    """Sixteen hex digits of every weight's name, shape, type and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def digest_of(values: Any) -> str:
    """Sixteen hex digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def feature_name(features: str, precision: str) -> str:
    """The choice of features with the precision they are computed in; fp32 goes without saying."""
    return features if precision == "fp32" else f"{features} in {precision}"


def pooled_only(source: str, features: str) -> None:
    """Raises UsageError unless the features are pooled, for networks whose tokens nobody hands out."""
    if features != "pooled":
        raise UsageError(
            f"third_features: {source} gives its pooled features only, not {features!r}; take third_features = pooled"
        )


def token_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean [B, P] over tokens [B, N, P]; with a mask [B, N] over those that count."""
    if mask is None:
        return tokens.mean(dim=1)
    counted = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def foreign(source: str, what: str, remedy: str = "") -> Iterator[None]:
    """Whatever another library's loader raises (network, hub, format) ends as CheckpointError with its reason."""
    try:
        yield
    except Exception as error:
        advice = f". {remedy}" if remedy else ""
        raise CheckpointError(
            f"{source}: {what} could not be loaded ({first_line(error)}){advice}"
        ) from error
