"""The demo: trains two third towers on the built-in world and compares the methods with both.

`matched` is trained on objects, which the captions describe. `mismatched` is trained on backgrounds and layouts only,
as a tower trained on places would be.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, PretrainConfig, RunConfig
from threetowers.train.pretrain import pretrain

TOWERS = {"matched": PretrainConfig(data="objects"), "mismatched": PretrainConfig(data="scenes", steps=125)}


def demo(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0, jobs: int = 1
) -> dict[str, Any] | None:
    """Pretrains both third towers in `out`, then runs `compare` with the other arguments and returns its result.

    Towers and runs that `out` holds already are not trained again.
    """
    config = replace(config, third=make_towers(config, out))
    return compare(config, options, out, max_minutes=max_minutes, jobs=jobs)


def make_towers(config: RunConfig, out: Path) -> tuple[str, ...]:
    """Pretrains the third towers that `out` does not hold yet, and returns their entries for `RunConfig.third`."""
    thirds = []
    for name, tower in TOWERS.items():
        folder = out / "towers" / name
        accuracy = pretrain(replace(tower, device=config.device), folder)
        print(f"third tower {name}: trained on {tower.data}, held-out accuracy {accuracy:.1%}", flush=True)
        thirds.append(f"{name}=file:{folder}")
    return tuple(thirds)
