"""Makes the third towers that come with the package from nothing, and says whether they are the same.

    python benchmarks/towers.py [--names matched …] [--out runs/towers] [--ship]

Without --ship nothing in the package is changed: each new tower is compared with the one there. Equal weights are to be
expected on the same kind of processor with the same number of threads and versions only; otherwise the accuracies and
the probes say whether the towers are as good. With --ship the new ones, in float16, replace those of the package.
About eight minutes on two cores.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from threetowers.compare.attributes import probe_tower
from threetowers.compare.machine import machine
from threetowers.compare.towers import TOWERS, make_tower
from threetowers.towers.frozen.built_in import FOLDER
from threetowers.towers.frozen.load import load_frozen

FILES = ("config.json", "model.safetensors", "pretrain.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--out", type=Path, default=Path("runs/towers"))
    parser.add_argument("--ship", action="store_true", help="replace the towers of the package")
    options = parser.parse_args()
    for name in options.names:
        folder = options.out / name
        make_tower(name, folder)
        half(folder, options.out / f"{name}-float16")
        print(f"{name}: {compared(options.out / f'{name}-float16', FOLDER / name)}", flush=True)
        if options.ship:
            ship(name, options.out / f"{name}-float16")


def half(source: Path, folder: Path) -> None:
    """A copy with weights in float16, which the package ships."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copy(source / file, folder / file)
    state = load_file(source / "model.safetensors")
    save_file(
        {key: value.half() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def compared(new: Path, old: Path) -> str:
    """In words, how a new tower differs from the one of the package."""
    made = json.loads((new / "pretrain.json").read_bytes())
    if not (old / "model.safetensors").is_file():
        return f"new, held-out accuracy {made['val/top1']:.1%}"
    was = json.loads((old / "pretrain.json").read_bytes())
    first, second = load_file(new / "model.safetensors"), load_file(old / "model.safetensors")
    if first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first):
        return f"the same to the bit, held-out accuracy {made['val/top1']:.1%}"
    return (
        f"other weights; held-out accuracy {made['val/top1']:.1%}, that of the package {was['val/top1']:.1%} "
        f"(made on {was['machine']['cpu']} with {was['machine']['threads']} threads, torch {was['machine']['torch']})"
    )


def ship(name: str, folder: Path) -> None:
    """Puts a tower into the package, with its card."""
    place = FOLDER / name
    place.mkdir(parents=True, exist_ok=True)
    for file in FILES[:2]:
        shutil.copy(folder / file, place / file)
        (place / file).chmod(0o644)
    described: dict[str, Any] = json.loads((folder / "pretrain.json").read_bytes())
    described |= {
        "summary": TOWERS[name].summary, "data": TOWERS[name].config.data, "model": TOWERS[name].config.model,
        "probes": probe_tower(load_frozen(f"file:{place}")), "machine": machine("cpu"),
    }  # fmt: skip
    (place / "pretrain.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (place / "README.md").write_text(card(name, described), encoding="utf-8")


def card(name: str, described: dict[str, Any]) -> str:
    """The card of a tower as Markdown."""
    config = TOWERS[name].config
    trained = (
        f"{config.steps:,} steps of {config.batch_size} images on the {described['classes']} classes of "
        f"`{config.data}` of the built-in world, seed {described['seed']}"
        if config.steps
        else "none: the weights are as they were initialised"
    )
    probes = "\n".join(f"| {attribute} | {value:.1%} |" for attribute, value in described["probes"].items())
    return (
        f"# shapes:{name}\n\n{described['summary']}\n\n"
        f"- Architecture: timm `{config.model}` at {config.size} pixels, weights in float16\n"
        f"- Training: {trained}\n"
        f"- Held-out accuracy on its own labels: {described['val/top1']:.1%}\n"
        f"- Licence: that of this package. Made by `make towers`\n\n"
        "Accuracy of a ridge regression on its features, which says what they hold of each attribute:\n\n"
        f"| attribute | test accuracy |\n|---|---|\n{probes}\n"
    )


if __name__ == "__main__":
    main()
