"""Changes to the folder of mistakes.py: towers that were replaced, do not pool, or are no weights."""

from collections.abc import Callable
from pathlib import Path

import timm
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1753492\n"


def replaced_by(text: str) -> Callable[[Path], object]:
    """Puts a text in place of the tower's weights."""
    return lambda folder: (folder / "tower" / "model.safetensors").write_text(text)


def other_tower(folder: Path) -> None:
    """The tower with other weights."""
    path = folder / "tower" / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path)


def without_pooling(folder: Path) -> None:
    """A tower that gives a map of features."""
    model = timm.create_model("test_resnet", num_classes=0, global_pool="")
    save_for_hf(model, str(folder / "unpooled"), safe_serialization=True, model_args={"global_pool": ""})
