"""What the study on real pictures runs: corpora, methods, and the numbers that docs/protocol_real.md fixed before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from threetowers.config import InputConfig, Method, OptimConfig, PairConfig, RunConfig
from threetowers.objective.pairs import METHODS
from threetowers.reproduce.plan import Part, Unit, nested
from threetowers.settings import replace_nested

Changes = Mapping[str, Any]
SEEDS = (1, 2, 3)
TUNING_SEED = 0


@dataclass(frozen=True)
class Corpus:
    """Captioned pictures.

    family: whose learning rates it takes; steps: the cap of every method; classes: whether there are labelled pictures.
    """

    family: str
    steps: int
    num_train: int
    classes: bool = True
    seeds: tuple[int, ...] = SEEDS


CORPORA: Mapping[str, Corpus] = {
    "icons-20000": Corpus("icons-20000", 800, 20_000),
    "icons-2000": Corpus("icons-20000", 400, 2_000),
    "emoji-by-concept": Corpus("emoji-by-concept", 400, 4_570),
    "icons-90000": Corpus("icons-20000", 1_600, 90_000),
    "clipart": Corpus("clipart", 400, 2_529, classes=False),
    "emoji-by-vendor": Corpus("emoji-by-concept", 400, 3_304),
    "icons-all": Corpus("icons-20000", 2_400, 300_000, seeds=(1,)),
}
"""In the order in which they run, those first that say most."""


@dataclass(frozen=True)
class Variant:
    """A method of the study.

    third: the names of its third towers, empty without one. changes: of its settings. grid: what is tried on the
    tuning's seed, by a word; empty where it takes the choice of `like`.
    """

    method: Method
    third: str = "imagenet"
    changes: tuple[tuple[str, Any], ...] = ()
    grid: tuple[tuple[str, Changes], ...] = ()
    like: str = ""


SCRATCH = tuple((f"lr {lr:g}", {"optim.lr": lr}) for lr in (1e-3, 2e-3, 4e-3))
WARM = tuple(
    (f"image × {factor:g}", {"optim.rules": (f"img.trunk.* lr={factor:g}",)}) for factor in (0.05, 0.15, 0.5)
)
FROM_THIRD = (("start.image", "third"),)

VARIANTS: dict[str, Variant] = {
    "baseline": Variant("baseline", "", grid=SCRATCH),
    "LiT": Variant("lit", grid=SCRATCH),
    "LiT unlocked": Variant("lit-unlocked", grid=WARM),
    "3T": Variant("3t", grid=SCRATCH),
    "3T main": Variant("3t-main", grid=SCRATCH),
    "regression warm": Variant("3t-regression", changes=FROM_THIRD, grid=WARM),
    "3T warm": Variant("3t-warm", grid=WARM),
    "3T main warm": Variant("3t-main-warm", grid=WARM),
}
"""The methods that every corpus is trained with."""

CONTROLS: dict[str, Variant] = {
    "3T main warm, third tower of random weights": Variant(
        "3t-main", "random", (("start.image", "imagenet"),), like="3T main warm"
    ),
    "3T main warm, third tower of icons": Variant(
        "3t-main", "icons", (("start.image", "imagenet"),), like="3T main warm"
    ),
    "3T main warm, third tower of sentences": Variant(
        "3t-main", "sentences", (("start.image", "imagenet"),), like="3T main warm"
    ),
    "3T main warm, ImageNet and sentences": Variant(
        "3t-main", "imagenet sentences", (("start.image", "imagenet"),), like="3T main warm"
    ),
    "3T main warm, BatchNorm trains": Variant(
        "3t-main-warm", changes=(("start.batchnorm", "train"),), like="3T main warm"
    ),
    "LiT unlocked, BatchNorm trains": Variant(
        "lit-unlocked", changes=(("start.batchnorm", "train"),), like="LiT unlocked"
    ),
}
"""Run on CONTROLLED alone."""
CONTROLLED = "icons-20000"


def base() -> RunConfig:
    """The settings of every run: 64-pixel pictures, batches of 128, two text layers of width 128."""
    return RunConfig(
        batch_size=128,
        log_every_steps=50,
        checkpoint_every_steps=200,
        keep_checkpoints=1,
        keep_best="val/mean_r@1",
        pair=PairConfig(
            embed_dim=128,
            vision={"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 64},
            text={"context_length": 32, "width": 128, "heads": 4, "layers": 2},
            tokenizer="trained",
            vocab_size=4_096,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        # arrows point somewhere, so no mirror images; pictures fill the frame, so gentle crops
        inputs=InputConfig(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), workers=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=50),
    )


def unit(part: Part, corpus: str, label: str, seed: int, choice: str = "") -> Unit:
    """The run of a method on a corpus; part `tuning` names the choice that it tries."""
    variant, about = (VARIANTS | CONTROLS)[label], CORPORA[corpus]
    said = f"{corpus} {label}" + (f" {choice}" if choice else "")
    third = variant.third.replace(" ", "+")
    return Unit(
        part, said, variant.method, third, seed, about.steps, base().optim.lr, about.num_train, size=corpus
    )  # type: ignore[arg-type]


def tuning_units() -> Iterator[tuple[Unit, str, str, Changes]]:
    """The trials: the unit, its family, its method and the changes that it tries."""
    for family in dict.fromkeys(corpus.family for corpus in CORPORA.values()):
        for label, variant in VARIANTS.items():
            for choice, changes in variant.grid:
                trial = unit("tuning", family, label, TUNING_SEED, choice)
                yield replace(trial, lr=changes.get("optim.lr", trial.lr)), family, label, changes


def main_units() -> Iterator[tuple[Unit, str, str]]:
    """The runs that are reported: the unit, its corpus and its method; controls come after their corpus."""
    for corpus, about in CORPORA.items():
        for seed in about.seeds:
            for label in VARIANTS:
                yield unit("main", corpus, label, seed), corpus, label
        if corpus == CONTROLLED:
            for seed in about.seeds:
                for label in CONTROLS:
                    yield unit("main", corpus, label, seed), corpus, label


def config(
    own: Unit, label: str, chosen: Changes, data: str, towers: Mapping[str, str], embeddings: str
) -> RunConfig:
    """The configuration of a run. chosen: what the tuning chose for it. towers: by name, as --third takes them."""
    variant, about = (VARIANTS | CONTROLS)[label], CORPORA[own.size]
    names = variant.third.split()
    third = tuple(towers[name] if len(names) == 1 else f"{name}={towers[name]}" for name in names)
    changes = dict(variant.changes) | dict(chosen)
    if changes.get("start.image") in towers:
        changes["start.image"] = towers[changes["start.image"]]
    if METHODS[variant.method].image == "start" or "start.image" in changes:
        changes["start.image_size"] = 64
    whole = replace(
        base(), method=variant.method, data=data, classes=f"{data}/classes/test" if about.classes else None,
        third=third, seed=own.seed, steps=about.steps, eval_every_steps=about.steps // 8, embeddings=embeddings,
    )  # fmt: skip
    return replace_nested(whole, nested(changes))
