"""The study on real pictures: which method is best for how many pairs, with a pretrained tower of ImageNet.

    python examples/real/study.py [--corpora icons-2000 …] [--max-minutes 60] [--jobs 0]

docs/protocol_real.md says what was fixed before the runs, and plan.py holds its numbers. Corpora and towers are made
on first use. Finished runs have records in docs/real/runs, and what was begun continues from its checkpoint.
docs/real.md is written from the records at the end of each call.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import corpora
import plan
import pretrained
from results import write_page

from threetowers.compare.concurrency import Concurrency
from threetowers.compare.side_by_side import Stopped
from threetowers.config import InputConfig, OptimConfig, PretrainConfig
from threetowers.errors import ThreeTowersError
from threetowers.progress import duration
from threetowers.reproduce.plan import Unit
from threetowers.reproduce.records import read_records
from threetowers.reproduce.runner import Runner
from threetowers.reproduce.tasks import Places, RunTask
from threetowers.train.pretrain import pretrain

STEPS_OF = {"lit": 0.3, "baseline": 0.5, "3t": 0.5, "3t-main": 0.5}
"""What a step of a method costs, in steps of a warm 3T; for the estimate."""


def make_towers(out: Path) -> dict[str, str]:
    """The pretrained towers by their names in plan.py, as --third takes them; what is missing is made."""
    imagenet, random, icons = out / "imagenet", out / "random", out / "icons"
    if not (imagenet / "model.safetensors").is_file():
        pretrained.lite(0, imagenet, size=96)
    if not (random / "model.safetensors").is_file():
        pretrained.random_lite(0, random, imagenet)
    if not (icons / "pretrain.json").is_file():
        corpora.make("icons", Path("data/icons-20000"), num=20_000)
        print("pretraining a tower of icons")
        settings = PretrainConfig(
            data="data/icons-20000/categories", model="tf_efficientnet_lite0", size=64, mean=(0.5,) * 3,
            std=(0.5,) * 3, steps=1_000, inputs=InputConfig(crop_scale=(0.6, 1.0), workers=0),
            optim=OptimConfig(lr=2e-3, warmup_steps=50),
        )  # fmt: skip
        print(f"held-out accuracy {pretrain(settings, icons):.1%}")
    return {
        "imagenet": f"timm:local-dir:{imagenet}", "random": f"timm:local-dir:{random}", "icons": f"file:{icons}",
        "sentences": pretrained.minilm(),
    }  # fmt: skip


def make_corpus(name: str) -> None:
    """A corpus by its name in plan.py, made on first use."""
    kind, _, rest = name.partition("-")
    if kind == "icons":
        corpora.make("icons", Path("data") / name, num=0 if rest == "all" else int(rest))
    else:
        corpora.make(kind, Path("data") / name, by=rest.removeprefix("by-"))


class Study:
    """One call of the study. places: of its runs and records. chosen: what the tuning chose, by family and method."""

    def __init__(
        self, places: Places, names: Sequence[str], runner: Runner, towers: Mapping[str, str]
    ) -> None:
        self.places, self.names, self.runner, self.towers = places, names, runner, towers
        self.families = {plan.CORPORA[name].family for name in names}

    def run(self, jobs: int) -> None:
        """The trials of the families that are needed, then the runs of the corpora in their order."""
        trials = [self._task(unit, label, changes) for unit, family, label, changes in self._tuning()]
        main = [each for each in plan.main_units() if each[1] in self.names]
        missing = [task.unit for task in trials if not task.record.is_file()]
        missing += [unit for unit, _, _ in main if not self.places.record(unit.name).is_file()]
        print(f"{len(missing):,} of {len(trials) + len(main):,} runs are to be made", flush=True)
        if not missing:
            return
        first = next(task for task in trials if task.unit.method == "3t-warm")
        self.runner.choose(jobs, first.config, len(missing), lambda found: estimate(missing, found))
        self.runner.run([task for task in trials if not task.record.is_file()], "trial")
        for name in self.names:
            tasks = [
                self._task(unit, label, self._chosen(name, label))
                for unit, corpus, label in main
                if corpus == name
            ]
            baselines = {task.unit.seed: task for task in tasks if task.unit.method == "baseline"}
            waiting = [task for task in tasks if not task.record.is_file()]
            beside = {
                task.unit.seed: baselines[task.unit.seed] for task in waiting if task.unit.method == "lit"
            }
            self.runner.run([task for task in beside.values() if not task.has_features()], "run")
            self.runner.run([
                RunTask(task.places, task.unit, task.config, beside[task.unit.seed])
                if task.unit.method == "lit" else task
                for task in waiting if not task.record.is_file()
            ], "run")  # fmt: skip

    def _tuning(self) -> list[tuple[Unit, str, str, plan.Changes]]:
        return [each for each in plan.tuning_units() if each[1] in self.families]

    def _chosen(self, corpus: str, label: str) -> plan.Changes:
        """What the tuning chose for a method: the changes with the best mean R@1 on validation."""
        variant = (plan.VARIANTS | plan.CONTROLS)[label]
        family, tuned = plan.CORPORA[corpus].family, variant.like or label
        records = read_records(self.places.records)
        scores = [
            (records[unit.name].metrics.get("val/mean_r@1", 0.0), changes)
            for unit, own, name, changes in self._tuning()
            if (own, name) == (family, tuned)
        ]
        return max(scores, key=lambda score: score[0])[1]

    def _task(self, unit: Unit, label: str, chosen: plan.Changes) -> RunTask:
        config = plan.config(
            unit, label, chosen, f"data/{unit.size}", self.towers, str(self.places.embeddings)
        )
        return RunTask(self.places, unit, config)


def estimate(missing: Sequence[Unit], found: Concurrency) -> str:
    """A sentence about how long the runs will take."""
    if found.step_seconds is None:
        return "how long it takes is known after the first runs"
    steps = sum(unit.steps * STEPS_OF.get(unit.method, 1.0) for unit in missing)
    return f"about {duration(steps * found.step_seconds)} on this machine, without embedding and evaluation"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", nargs="+", choices=plan.CORPORA, default=list(plan.CORPORA))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/real"), help="folder of runs, towers and embeddings"
    )
    parser.add_argument("--records", type=Path, default=Path("docs/real/runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs/real.md"))
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at a time; 0 takes what a trial finds fastest"
    )
    parser.add_argument(
        "--max-minutes", type=float, default=0.0, help="stop after this long, to be continued"
    )
    options = parser.parse_args()
    for folder in (options.out, options.records):
        folder.mkdir(parents=True, exist_ok=True)
    towers = make_towers(options.out / "towers")
    for name in dict.fromkeys([*(plan.CORPORA[name].family for name in options.corpora), *options.corpora]):
        make_corpus(name)
    places = Places(options.out, options.records)
    stopped = False
    try:
        Study(places, options.corpora, Runner(options.out, options.max_minutes), towers).run(options.jobs)
    except Stopped:
        stopped = True
    write_page(options.docs, read_records(options.records))
    print(f"written: {options.docs}" + ("; the same command continues" if stopped else ""))


if __name__ == "__main__":
    try:
        main()
    except ThreeTowersError as error:
        sys.exit(str(error))
