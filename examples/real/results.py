"""docs/real.md out of the records of the study on real pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plan

from threetowers.evaluate.statistics import paired_difference, t_interval
from threetowers.files import write_whole
from threetowers.reproduce.records import Record, of_part

SCORE = "retrieval/mean_r@1"
COLUMNS = {
    SCORE: "R@1",
    "zero_shot/top1": "zero-shot",
    "combination/mean_r@1": "combined",
    "control/mean_r@1": "score average",
}
RIVALS = ("LiT", "LiT unlocked")
"""What a warm 3T is compared with."""


def write_page(path: Path, records: Mapping[str, Record]) -> None:
    """Writes the page; sections without a record are left out."""
    main = of_part(records.values(), "main")
    lines = [
        "# Real pictures", "",
        "`python examples/real/study.py` writes this page from the records in `real/runs`. "
        "[protocol_real.md](protocol_real.md) says what was fixed before the runs.", "",
        _progress(records), "",
    ]  # fmt: skip
    for corpus in plan.CORPORA:
        own = [record for record in main if record.settings["size"] == corpus]
        if own:
            lines += [
                f"## {corpus}",
                "",
                *_table(corpus, own),
                *_differences(corpus, own),
                *_at_equal_time(corpus, own),
            ]
    tuning = of_part(records.values(), "tuning")
    if tuning:
        lines += ["## Tuning", "", *_trials(tuning)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def by_label(corpus: str, records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """The records of a corpus by method and seed, in the order of the plan; diverged ones are left out."""
    found: dict[str, dict[int, Record]] = {}
    for label in (*plan.VARIANTS, *plan.CONTROLS):
        own = {
            record.settings["seed"]: record
            for record in records
            if record.settings["label"] == f"{corpus} {label}" and not record.diverged
        }
        if own:
            found[label] = own
    return found


def mean_text(values: Sequence[float]) -> str:
    """A mean in percent, with half the width of its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    mean, low, high = t_interval(values)
    return f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def _progress(records: Mapping[str, Record]) -> str:
    parts = {
        "tuning": [unit.name for unit, *_ in plan.tuning_units()],
        "runs": [unit.name for unit, *_ in plan.main_units()],
    }
    counts = [f"{len(records.keys() & set(names))} of {len(names)} {part}" for part, names in parts.items()]
    machines = {
        f"{record.described['machine']['cores']} cores of {record.described['machine']['cpu']}, torch "
        f"{record.described['machine']['torch']}"
        for record in records.values()
    }
    return f"Done: {' and '.join(counts)}. Machines: {'; '.join(sorted(machines)) or 'none'}."


def _metrics(record: Record) -> dict[str, float]:
    """The metrics of a record, with that of its control."""
    control = {"control/mean_r@1": record.control["chosen"]} if record.control else {}
    return {**record.metrics, **control}


def _table(corpus: str, records: Sequence[Record]) -> list[str]:
    rows = []
    for label, seeds in by_label(corpus, records).items():
        cells = []
        for metric in COLUMNS:
            known = [_metrics(record) for record in seeds.values()]
            values = [metrics[metric] for metrics in known if metric in metrics]
            cells.append(mean_text(values) if len(values) == len(seeds) else "–")
        alphas = [f"{record.combination['alpha']:g}" for record in seeds.values() if record.combination]
        first = next(iter(seeds.values())).described
        last = sum(
            record.described["curve"][-1][2] >= max(p[2] for p in record.described["curve"])
            for record in seeds.values()
        )
        seconds = sum(record.described["seconds"] for record in seeds.values()) / len(seeds)
        rows.append([
            label, *cells, ", ".join(alphas) or "–", f"{first['num_main'] / 1e6:.2f}", f"{seconds / 60:.1f}",
            f"{last} of {len(seeds)}",
        ])  # fmt: skip
    about = plan.CORPORA[corpus]
    return [
        f"{about.num_train:,} training pictures, {about.steps:,} steps of 128. Percent: mean over the seeds, ± half "
        "the width of its 95 % interval.",
        "",
        *_rows(["method", *COLUMNS.values(), "α", "parameters, M", "minutes", "best at the last step"], rows),
    ]


def _differences(corpus: str, records: Sequence[Record]) -> list[str]:
    """Each warm 3T against LiT and unlocked LiT, paired by seed."""
    found, rows = by_label(corpus, records), []
    for label in (label for label in found if label.startswith("3T")):
        for rival in (*RIVALS, "baseline"):
            seeds = sorted(found[label].keys() & found.get(rival, {}).keys())
            if len(seeds) > 1:
                ours, theirs = (
                    [found[name][seed].metrics[SCORE] for seed in seeds] for name in (label, rival)
                )
                gap = paired_difference(ours, theirs)
                interval = f"{100 * gap.low:.1f} to {100 * gap.high:.1f}"
                rows.append([f"{label} − {rival}", f"{100 * gap.mean:+.1f}", interval, f"{len(seeds)}"])
    if not rows:
        return []
    head = ["difference in R@1", "points", "95 % interval", "seeds"]
    return ["Paired by seed, without a correction for the number of comparisons:", "", *_rows(head, rows)]


def _at_equal_time(corpus: str, records: Sequence[Record]) -> list[str]:
    """The best validation R@1 of each method in the time that the fastest one took."""
    found = by_label(corpus, records)
    limit = min(
        sum(record.described["seconds"] for record in seeds.values()) / len(seeds) for seeds in found.values()
    )
    rows = []
    for label, seeds in found.items():
        best = [
            max((value for _, seconds, value in record.described["curve"] if seconds <= limit), default=0.0)
            for record in seeds.values()
        ]
        rows.append([label, mean_text(best)])
    said = f"Validation R@1 after {limit / 60:.1f} minutes of training, as long as the fastest took; without embedding:"
    return [said, "", *_rows(["method", "R@1 on validation"], rows)]


def _trials(tuning: Sequence[Record]) -> list[str]:
    rows = []
    records = {record.settings["label"]: record for record in tuning}
    for family in dict.fromkeys(corpus.family for corpus in plan.CORPORA.values()):
        for label, variant in plan.VARIANTS.items():
            tried = {
                choice: records[f"{family} {label} {choice}"].metrics.get("val/mean_r@1", 0.0)
                for choice, _ in variant.grid
                if f"{family} {label} {choice}" in records
            }
            if tried:
                best = max(tried, key=lambda choice: tried[choice])
                said = ", ".join(f"{choice}: {100 * value:.1f}" for choice, value in tried.items())
                edge = best in (variant.grid[0][0], variant.grid[-1][0])
                rows.append([family, label, best, "yes" if edge else "no", said])
    return [
        "R@1 on validation with seed 0, percent.", "",
        *_rows(["corpus", "method", "chosen", "on the edge of what was tried", "tried"], rows),
    ]  # fmt: skip


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
