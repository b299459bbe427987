"""The whole method on the built-in world: two third towers of one's own, and the comparison with both.

`matched` knows objects, what the captions speak of; `mismatched` knows only backgrounds and layouts, the small
likeness of a tower trained on places.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, PretrainConfig, RunConfig
from threetowers.train.pretrain import pretrain

TOWERS = {"matched": PretrainConfig(data="objects"), "mismatched": PretrainConfig(data="scenes", steps=125)}


def demo(config: RunConfig, options: CompareConfig, out: Path) -> dict[str, Any] | None:
    """Pretrains both third towers in `out`, then compares; returns as `compare` does. What is done is kept."""
    return compare(replace(config, third=make_towers(config, out)), options, out)


def make_towers(config: RunConfig, out: Path) -> tuple[str, ...]:
    """Pretrains the third towers that `out` does not hold yet; their entries for `RunConfig.third`."""
    thirds = []
    for name, tower in TOWERS.items():
        folder = out / "towers" / name
        accuracy = pretrain(replace(tower, device=config.device), folder)
        print(f"third tower {name}: trained on {tower.data}, held-out accuracy {accuracy:.1%}", flush=True)
        thirds.append(f"{name}=file:{folder}")
    return tuple(thirds)
