"""What the study runs: parts, units, and the numbers that docs/protocol.md fixed before the runs.

A unit is one training run. Learning rates are chosen on the world of `tuning_seed`; every other unit is on the world,
and with the third towers, of its own seed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from threetowers.compare.claims import MISMATCHED, TWICE
from threetowers.config import Method, RunConfig, StartConfig
from threetowers.errors import UsageError
from threetowers.objective.pairs import METHODS
from threetowers.recipes import PRESETS
from threetowers.settings import replace_nested

Part = Literal["tuning", "main", "growth", "ablations", "budgets"]
PARTS: tuple[Part, ...] = ("tuning", "main", "growth", "ablations", "budgets")
OF_CLAIM: Mapping[str, tuple[Part, ...]] = {
    "C1": ("main",), "C2": ("main",), "C3": ("main",), "C4": ("main",), "C5": ("growth",), "C6": ("main",),
}  # fmt: skip
"""The parts that a claim is tested by; every part takes its learning rates from `tuning`."""
MATCHED = "matched"
TUNED_THIRDS = (MATCHED, MISMATCHED)
ALL_METHODS: tuple[Method, ...] = ("baseline", "lit", "lit-unlocked", "3t", "3t-main", "3t-regression")
FEW_METHODS: tuple[Method, ...] = ("lit", "3t", "3t-main")
GROWTH_METHODS: tuple[Method, ...] = ("lit", "3t")

Changes = Mapping[str, Any]
"""Settings that differ from those of the study, by dotted key."""


@dataclass(frozen=True)
class Protocol:
    """The numbers of the study.

    seeds: of the worlds, third towers and runs whose figures are reported. few_seeds: those of ablations and budgets.
    num_eval: images for validation, and as many for the test.
    own_towers: whether each seed has third towers of its own; without, those of the package are used. lrs: the grid,
    which is extended by factors of 2 while the best is on its edge, up to `max_extensions` times; with a single one
    nothing is tuned.
    """

    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    few_seeds: tuple[int, ...] = (101, 102, 103)
    tuning_seed: int = 0
    own_towers: bool = True
    steps: int = 500
    growth_steps: int = 250
    num_train: int = 10_000
    num_eval: int = 1_000
    data_sizes: tuple[int, ...] = (625, 2_500, 10_000)
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    max_extensions: int = 2
    margin: float = 0.02
    budgets: tuple[int, ...] = (1_000, 2_000)
    parts: tuple[Part, ...] = PARTS
    methods: tuple[Method, ...] = ALL_METHODS
    thirds: tuple[str, ...] = (MATCHED, MISMATCHED, "rich", "partly", "random")
    smoke: tuple[tuple[str, Any], ...] = ()
    """Further settings of every run, by dotted key; tests make runs small with them."""


FULL = Protocol()
QUICK = replace(
    FULL,
    seeds=(201, 202, 203),
    own_towers=False,
    steps=250,
    lrs=(2e-3,),
    parts=("main",),
    methods=("baseline", "lit", "3t", "3t-main"),
    thirds=TUNED_THIRDS,
)


@dataclass(frozen=True)
class Unit:
    """One training run of the study.

    label: what the figures call it; the method, unless settings differ. third: the name of the third tower, or
    empty. lr: None takes the one that the tuning chose for `tuned`. num_train: training images of its world. changes:
    dotted keys with values. size: of the main towers where they are not those of the preset.
    """

    part: Part
    label: str
    method: Method
    third: str
    seed: int
    steps: int
    lr: float | None = None
    num_train: int = FULL.num_train
    changes: tuple[tuple[str, Any], ...] = ()
    size: str = ""

    @property
    def name(self) -> str:
        """Of its record and its run folder."""
        words = [self.part, re.sub(r"[^\w.-]+", "_", self.label), self.third, f"seed{self.seed}"]
        if self.part == "tuning":
            words.append(f"lr{self.lr:g}")
        return "-".join(filter(None, words))

    @property
    def tuned(self) -> tuple[str, str]:
        """Label and third tower of the tuning units whose best learning rate it takes."""
        label = f"{self.method} {self.size}" if self.size else self.method
        if not METHODS[self.method].needs_third:
            return label, ""
        return label, self.third if self.third in TUNED_THIRDS and not self.size else MATCHED

    def config(self, lr: float, data: str, third: str, embeddings: str, smoke: Changes) -> RunConfig:
        """The configuration of its run. data: folder of its world. third: its third tower as --third takes it."""
        base = replace(
            PRESETS["shapes"](), method=self.method, data=data, classes=f"{data}/objects/test", seed=self.seed,
            third=(third,) if self.third else (), embeddings=embeddings, eval_every_steps=0, start=StartConfig(lr=1.0),
        )  # fmt: skip
        return replace_nested(
            base, nested({"steps": self.steps, "optim.lr": lr, **dict(self.changes), **smoke})
        )


def nested(changes: Changes) -> dict[str, Any]:
    """Dotted keys as nested tables.

    >>> nested({"steps": 5, "optim.lr": 1e-3})
    {'steps': 5, 'optim': {'lr': 0.001}}
    """
    tables: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, last = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return tables


def chosen_parts(protocol: Protocol, only: Sequence[str]) -> tuple[Part, ...]:
    """The parts that claims and parts by name stand for, with the tuning that they need; all without names.

    Raises UsageError for a word that is neither, or a part that this protocol does not have.
    """
    wanted: set[str] = set()
    for word in only:
        found = OF_CLAIM.get(word.upper(), (word,))
        if missing := [part for part in found if part not in protocol.parts]:
            known = [*OF_CLAIM, *protocol.parts]
            raise UsageError(f"--only: {word!r} needs {missing[0]!r}, which is not among {', '.join(known)}")
        wanted |= {*found, "tuning"}
    return tuple(part for part in protocol.parts if not only or part in wanted)


def tuning_units(protocol: Protocol, lrs: Iterable[float] | None = None) -> Iterator[Unit]:
    """The trials of learning rates: all of the protocol's, or those given."""
    for lr in protocol.lrs if lrs is None else lrs:
        for method in protocol.methods:
            for third in TUNED_THIRDS if METHODS[method].needs_third else ("",):
                yield Unit(
                    "tuning",
                    method,
                    method,
                    third,
                    protocol.tuning_seed,
                    protocol.steps,
                    lr,
                    protocol.num_train,
                )
        for size, changes in SIZES.items() if "growth" in protocol.parts else ():
            for method in GROWTH_METHODS:
                yield Unit(
                    "tuning", f"{method} {size}", method, MATCHED, protocol.tuning_seed, protocol.growth_steps, lr,
                    num_train=protocol.num_train, changes=tuple(changes.items()), size=size,
                )  # fmt: skip


def units(protocol: Protocol, part: Part) -> Iterator[Unit]:
    """The units of a part, those first that others need."""
    make = {
        "tuning": tuning_units,
        "main": _main,
        "growth": _growth,
        "ablations": _ablations,
        "budgets": _budgets,
    }
    for unit in make[part](protocol):
        yield unit if part == "growth" else replace(unit, num_train=protocol.num_train)


def _main(protocol: Protocol) -> Iterator[Unit]:
    steps = protocol.steps
    if "baseline" in protocol.methods:
        for seed in protocol.seeds:
            yield Unit("main", "baseline", "baseline", "", seed, steps)
    for seed in protocol.seeds:
        for third in protocol.thirds:
            for method in protocol.methods:
                if method != "baseline" and (third in TUNED_THIRDS or method in FEW_METHODS):
                    yield Unit("main", method, method, third, seed, steps)
        for method in (method for method in FEW_METHODS[1:] if method in protocol.methods):
            yield Unit("main", method + TWICE, method, MATCHED, seed, 2 * steps)


SIZES: Mapping[str, Changes] = {
    name: {
        "pair.vision": {"layers": 4, "width": width, "head_width": 16, "patch_size": 8, "image_size": 32},
        "pair.text": {"context_length": 32, "width": width, "heads": width // 16, "layers": 2},
    }
    for name, width in (("small", 32), ("medium", 64), ("large", 128))
}
"""Main towers of three sizes: ViTs of 16 patches and text towers of the same width."""


def _growth(protocol: Protocol) -> Iterator[Unit]:
    for seed in protocol.seeds:
        for third in TUNED_THIRDS:
            for size, changes in SIZES.items():
                for num_train in protocol.data_sizes:
                    for method in GROWTH_METHODS:
                        yield Unit(
                            "growth", f"{method} {size} {num_train}", method, third, seed, protocol.growth_steps,
                            num_train=num_train, changes=tuple(changes.items()), size=size,
                        )  # fmt: skip


ABLATIONS: Mapping[str, Changes] = {
    "heads on the third tower alone": {"objective.heads": "third"},
    "heads on the main towers alone": {"objective.heads": "main"},
    "embeddings as wide as the third tower's": {"pair.embed_dim": 192},
    "no heads, embeddings as wide as the third tower's": {"objective.heads": "none", "pair.embed_dim": 192},
    "without the text row": {"objective.weights": (0.5, 0.5, 0.0)},
    "without the image row": {"objective.weights": (0.5, 0.0, 0.5)},
    "without the main row": {"objective.weights": (0.0, 0.5, 0.5)},
    "weights .8 .1 .1": {"objective.weights": (0.8, 0.1, 0.1)},
    "weights .2 .4 .4": {"objective.weights": (0.2, 0.4, 0.4)},
    "weights from .2 .4 .4 to .8 .1 .1, linear": {
        "objective.weights": (0.2, 0.4, 0.4), "objective.weights_schedule": "linear",
        "objective.weights_end": (0.8, 0.1, 0.1),
    },
    "weights from .2 .4 .4 to .8 .1 .1, cosine": {
        "objective.weights": (0.2, 0.4, 0.4), "objective.weights_schedule": "cosine",
        "objective.weights_end": (0.8, 0.1, 0.1),
    },
    "a scale per row": {"objective.scale": "per-row"},
    "scale from 1/0.07": {"objective.init_scale": 1 / 0.07},
    "scale at the full learning rate": {"optim.scale_lr_multiplier": 1.0},
    "scale from 1/0.07 at the full learning rate": {
        "objective.init_scale": 1 / 0.07, "optim.scale_lr_multiplier": 1.0,
    },
    "the third tower sees the augmented view": {"inputs.third_view": "same"},
    "four stored views": {"inputs.stored_views": 4},
    "sigmoid": {"objective.kind": "sigmoid"},
    "the image tower starts at the third tower's weights": {"start.image": "third"},
}  # fmt: skip
"""3T with the matched third tower, one thing changed at a time."""

WIDTHS: Mapping[str, str] = {
    "third tower of 64 outputs": "matched-64",
    "third tower of 576 outputs": "matched-576",
}
"""3T with a third tower that was trained as the matched one, and has a third or three times its outputs."""


def _ablations(protocol: Protocol) -> Iterator[Unit]:
    for seed in protocol.few_seeds:
        for label, changes in ABLATIONS.items():
            yield Unit(
                "ablations", label, "3t", MATCHED, seed, protocol.steps, changes=tuple(changes.items())
            )
        for label, third in WIDTHS.items():
            yield Unit("ablations", label, "3t", third, seed, protocol.steps)


def _budgets(protocol: Protocol) -> Iterator[Unit]:
    """More steps with the mismatched tower, beside the baseline."""
    for seed in protocol.few_seeds:
        for steps in protocol.budgets:
            yield Unit("budgets", f"baseline {steps}", "baseline", "", seed, steps)
            for method in FEW_METHODS:
                yield Unit("budgets", f"{method} {steps}", method, MISMATCHED, seed, steps)
