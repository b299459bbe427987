"""The third towers of the built-in world: what each is trained on, and how it is made from nothing.

`shapes:NAME` is the one of seed 0 that comes with the package, its weights in float16. A study over seeds makes one for
each seed, on labelled images of that seed's world.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from threetowers.config import PretrainConfig
from threetowers.run.setup import labelled_world
from threetowers.train.guards import StopRequest
from threetowers.train.pretrain import pretrain
from threetowers.world.scenes import KINDS, SHAPES


@dataclass(frozen=True)
class Recipe:
    """What a tower is, in a sentence, and how it is trained; `data` is a kind of the world's labelled images."""

    summary: str
    config: PretrainConfig


TOWERS = {
    "matched": Recipe(
        "It tells textures and shapes apart, which captions name, and no colours or positions.",
        PretrainConfig(data="objects"),
    ),
    "mismatched": Recipe(
        "It tells backgrounds and layouts apart, as a tower trained on places would, and no objects.",
        PretrainConfig(data="scenes", steps=300),
    ),
    "rich": Recipe(
        "It tells size, texture, colour and shape of single objects apart.",
        PretrainConfig(data="attributes", heads="words"),
    ),
    "partly": Recipe(
        "As matched, but trained on the classes of six of the twelve shapes.",
        PretrainConfig(data="objects", only=tuple(f"* {shape}" for shape in SHAPES[: len(SHAPES) // 2])),
    ),
    "random": Recipe("Its weights are untrained.", PretrainConfig(data="objects", steps=0)),
}
"""Those that come with the package."""

OF_OTHER_WIDTHS = {
    "matched-64": Recipe(
        "As matched, but with 64 outputs.", PretrainConfig(data="objects", model_args={"num_features": 64})
    ),
    "matched-576": Recipe(
        "As matched, but with 576 outputs.", PretrainConfig(data="objects", model_args={"num_features": 576})
    ),
}
"""Those that an ablation of the study trains; the others have 192 outputs."""


def recipe(name: str) -> Recipe:
    """What the tower is, and how it is trained."""
    return {**TOWERS, **OF_OTHER_WIDTHS}[name]


def make_tower(
    name: str, folder: Path, *, seed: int = 0, device: str = "auto", stop: StopRequest | None = None
) -> float:
    """Trains the tower on the labelled images of this seed's world; returns its accuracy on held-out images.

    A folder that holds it already is left as it is. The weights depend on the machine and its number of threads in
    their last bits. Raises Interrupted when `stop` was requested.
    """
    config = recipe(name).config
    (kind,) = (kind for kind in KINDS if kind == config.data)
    config = replace(config, data=str(labelled_world(kind, seed)), seed=seed, device=device)
    return pretrain(config, folder, stop=stop)
