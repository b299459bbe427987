"""Frozen towers: loaded ones by what they read, open_clip folders, and a text tower of one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.load import load_frozen


def image_tower(spec: str, **options: str) -> FrozenTower:
    """The frozen tower of this name, which must read images."""
    tower = load_frozen(spec, **options)
    assert tower.reads == "images"
    return tower


def text_tower(spec: str, **options: str) -> FrozenTower:
    """The frozen tower of this name, which must read texts."""
    tower = load_frozen(spec, **options)
    assert tower.reads == "texts"
    return tower


class EmbeddingTower(nn.Module):
    """A text tower that is one embedding, so that a test sees through it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.context_length = 4
        self.embedding = nn.Embedding(30, width)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens)
        return embedded.mean(dim=1)


def timm_folder(folder: Path, seed: int, size: int, crop_pct: float, interpolation: str) -> str:
    """A timm network with random weights in timm's local-dir format, with its own mean and std; returns its name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("test_convnext2", num_classes=7)
    model.pretrained_cfg.update(
        input_size=(3, size, size),
        mean=(0.3, 0.4, 0.5),
        std=(0.2, 0.3, 0.4),
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    save_for_hf(model, str(folder), safe_serialization=True)
    return f"timm:local-dir:{folder}"


def open_clip_folder(
    folder: Path,
    context_length: int,
    vocab_size: int,
    *,
    custom_text: bool = False,
    preprocess: dict[str, Any] | None = None,
) -> Path:
    """A tiny open_clip model with random weights in open_clip's local-dir layout.

    custom_text: as a CustomTextCLIP, whose text tower is a module of its own, instead of the plain CLIP layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
        **({"custom_text": True} if custom_text else {}),
    }
    make = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = make(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}})
    )
    return folder


class ByteTokenizer:
    """The bytes of a text; 0 is padding."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [list(text.encode()) for text in texts]
        width = max(map(len, rows)) + 3  # more padding than is needed, for the caller to cut
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def lengths(self, tokens: Tensor) -> Tensor:
        return (tokens > 0).sum(1)

    def as_dict(self) -> dict[str, str]:
        return {"kind": "bytes"}


class ByteSums(nn.Module):
    """The sum of a random vector for each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.weight[tokens] * (tokens > 0).unsqueeze(-1)).sum(1)


def byte_tower(spec: str = "hf-text:tiny", view: str = "third", **_: str) -> FrozenTower:
    """A frozen text tower that needs no files; it takes the arguments of `load_frozen`."""
    return FrozenTower(view, spec, ByteSums(), 12, ByteTokenizer())
