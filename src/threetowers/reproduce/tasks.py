"""The tasks of the study: what is made for a seed before its runs, and the runs; each is a process's work."""

from dataclasses import dataclass
from pathlib import Path

from threetowers.compare.attributes import probe_tower
from threetowers.compare.machine import machine
from threetowers.compare.side_by_side import Outcome
from threetowers.compare.towers import make_tower, recipe
from threetowers.config import RunConfig
from threetowers.errors import NonFiniteError
from threetowers.reproduce.measure import diverged, evaluated, full_record, tuning_record
from threetowers.reproduce.plan import Unit
from threetowers.reproduce.records import Record, write_record
from threetowers.run.setup import rendered
from threetowers.towers.frozen.load import load_frozen
from threetowers.train.guards import StopRequest
from threetowers.train.loop import train
from threetowers.train.pretrain import Interrupted


@dataclass(frozen=True)
class Places:
    """Where the study keeps its files. shipped: whether third towers are those of the package."""

    out: Path
    records: Path
    shipped: bool = False

    def world(self, seed: int, num_train: int) -> Path:
        return self.out / "worlds" / f"seed{seed}-{num_train}"

    def third(self, name: str, seed: int, tuning_seed: int) -> str:
        """The third tower of a seed as --third takes it; the tuning uses those of the package."""
        own = not self.shipped and seed != tuning_seed
        return f"file:{self.tower(name, seed)}" if own else f"shapes:{name}"

    def tower(self, name: str, seed: int) -> Path:
        return self.out / "towers" / f"{name}-seed{seed}"

    def run(self, unit: Unit) -> Path:
        return self.out / "runs" / unit.name

    def record(self, name: str) -> Path:
        return self.records / f"{name}.json"

    @property
    def page(self) -> Path:
        """The folder of study.json and its page: the records' own parent, so that they are kept together."""
        return self.records.parent

    @property
    def embeddings(self) -> Path:
        return self.out / "embeddings"


def render_world(places: Places, seed: int, num_train: int, num_eval: int) -> None:
    """The world of a seed on disk, rendered on first use."""
    rendered(
        places.world(seed, num_train),
        seed=seed, num_train=num_train, num_val=num_eval, num_test=num_eval, num_labelled=0,
    )  # fmt: skip


@dataclass(frozen=True)
class TowerTask:
    """Pretrains a third tower of a seed, and writes its record."""

    places: Places
    tower: str
    seed: int
    num_train: int

    @property
    def name(self) -> str:
        return f"third tower {self.tower}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.places.tower(self.tower, self.seed)

    @property
    def record(self) -> Path:
        return self.places.record(f"towers-{self.tower}-seed{self.seed}")

    @property
    def steps(self) -> int:
        return max(recipe(self.tower).config.steps, 1)

    def run(self, stop: StopRequest | None = None) -> Outcome:
        """Trains it, unless it is on disk; one that was stopped begins anew."""
        try:
            accuracy = make_tower(self.tower, self.folder, seed=self.seed, stop=stop)
        except Interrupted:
            return Outcome(False, True)
        settings = {
            "part": "towers",
            "label": self.tower,
            "third": self.tower,
            "seed": self.seed,
            "steps": self.steps,
        }
        frozen, world = load_frozen(f"file:{self.folder}"), self.places.world(self.seed, self.num_train)
        probes = {f"probe/{name}": value for name, value in probe_tower(frozen, world).items()}
        record = Record(settings, {"own/top1": accuracy, **probes}, described={"machine": machine("cpu")})
        write_record(self.record, record)
        return Outcome(True, False, f"held-out accuracy {accuracy:.1%}")


@dataclass(frozen=True)
class RunTask:
    """Trains a unit and writes its record.

    baseline: the task whose run a LiT is averaged with, as control of the combination; it must have run, or it is run
    now.
    """

    places: Places
    unit: Unit
    config: RunConfig
    baseline: "RunTask | None" = None

    @property
    def name(self) -> str:
        return self.unit.name

    @property
    def folder(self) -> Path:
        return self.places.run(self.unit)

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def record(self) -> Path:
        return self.places.record(self.unit.name)

    def run(self, stop: StopRequest | None = None) -> Outcome:
        """Trains it, or continues it; a training that does not stay finite has a record of its own."""
        unit, lr = self.unit, self.config.optim.lr
        try:
            trained = train(self.config, self.folder, stop=stop)
        except NonFiniteError as error:
            write_record(self.record, diverged(unit, lr, self.folder, error))
            return Outcome(True, False, f"diverged: {error}")
        if not trained.finished:
            return Outcome(False, trained.stopped)
        if unit.part == "tuning":
            record = tuning_record(unit, self.config, self.folder)
        else:
            beside = None
            if self.baseline is not None:
                if not self.baseline.has_features():
                    done = self.baseline.run(stop)
                    if not done.finished:
                        return done
                beside = evaluated(self.baseline.unit, self.baseline.config, self.baseline.folder)
            world = self.places.world(unit.seed, unit.num_train)
            record = full_record(unit, self.config, self.folder, world, beside)
        write_record(self.record, record)
        figures = ", ".join(
            f"{name} {record.metrics[name]:.1%}"
            for name in ("val/mean_r@1", "retrieval/mean_r@1", "zero_shot/top1", "combination/mean_r@1")
            if name in record.metrics
        )
        return Outcome(True, trained.stopped, figures)

    def has_features(self) -> bool:
        """Whether the evaluated run is on this machine's disk, which a record from another one does not say."""
        return (self.folder / "features.safetensors").is_file() and (
            self.folder / "evaluation.json"
        ).is_file()
