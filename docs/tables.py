"""The tables of the documents that are drawn from the code's lists, and from the committed results of the study.

    python docs/tables.py            # writes every marked table of the documents again; `make docs`
    python docs/tables.py --check    # changes nothing; exits with 1 and names the files that would change

A document marks the place of a table by a pair of comments, and what stands between them is replaced:

    <!-- table: methods -->
    <!-- end -->
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import cost
import hours
from threetowers.config import Method, RunConfig
from threetowers.data.open import FORMATS
from threetowers.evaluate.suite.tasks import TASKS
from threetowers.export.formats import FORMATS as EXPORTS
from threetowers.objective.kinds import LOSSES
from threetowers.objective.pairs import Objective, objective
from threetowers.recipes import PRESETS
from threetowers.report.claims import title
from threetowers.towers.frozen.load import KINDS
from threetowers.train.profile import PHASES

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "claims" / "study.json"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
)
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

THIRDS = ("matched", "rich", "partly", "mismatched", "random")
"""The third towers of the study, from those that know most of the captions to those that know least."""
RETRIEVAL, CLASSES = "retrieval/mean_r@1", "zero_shot/top1"
CHOICES = [(f"`{name}`", name) for name in ("baseline", "lit", "lit-unlocked", "3t", "3t-main")]
"""The methods that docs/choosing.md compares: heading and label."""
SCHEDULES = (
    ("1/3 each (`3t`)", "3t"),
    ("0.6, 0.2, 0.2 (`3t-main`)", "3t-main"),
    ("0.8, 0.1, 0.1", "weights .8 .1 .1"),
    ("0.2, 0.4, 0.4", "weights .2 .4 .4"),
    ("from 0.2, 0.4, 0.4 to 0.8, 0.1, 0.1, linear", "weights from .2 .4 .4 to .8 .1 .1, linear"),
    ("from 0.2, 0.4, 0.4 to 0.8, 0.1, 0.1, cosine", "weights from .2 .4 .4 to .8 .1 .1, cosine"),
)
"""The weights and schedules that docs/method.md compares: heading, and label of the ablation."""
IMAGE_TOWERS = {
    "own": "trained from scratch",
    "third": "the frozen tower and one trained linear projection",
    "start": "starts at the frozen tower's weights and trains",
}


def tables() -> dict[str, str]:
    """Every table as Markdown, by the name that the documents mark its place with."""
    study = json.loads(STUDY.read_bytes())
    return {
        "formats": markdown(("you have", "you give as `--data`"), ((f.have, f.give) for f in FORMATS)),
        "towers": markdown(("name", "meaning"), ((_code(kind.forms), kind.help) for kind in KINDS)),
        "methods": markdown(
            ("`--method`", "rows of the objective", "weights", "image tower"),
            (
                (f"`{name}`", _rows(table), _weights(table), IMAGE_TOWERS[table.image])
                for name, table in _objectives().items()
            ),
        ),
        "presets": markdown(
            ("preset", "what it is"),
            ((f"`{name}`", (preset.__doc__ or "").splitlines()[0]) for name, preset in PRESETS.items()),
        ),
        "tasks": markdown(
            ("task", "what is measured", "main metric"),
            ((f"`{name}`", task.help, f"`{task.metric}`") for name, task in TASKS.items()),
        ),
        "exports": markdown(
            ("`--to`", "what is written"), ((f"`{name}`", form.help) for name, form in EXPORTS.items())
        ),
        "hours": markdown(
            ("recipe", "images", "samples seen by a run", "hours for embedding", "hours of a 3T run"),
            hours.rows(),
        ),
        "cost": markdown(
            (
                "method",
                "GPUs",
                "batch",
                "TFLOP of a GPU",
                "of it heads and loss",
                "MB sent",
                "GB of memory",
                "ms a step",
                "most of it",
                "hours for a billion pairs",
            ),
            cost.rows(PRESETS["vit-b-32"]()),
        ),
        "phases": markdown(("phase", "what it is"), PHASES.items()),
        "claims": claims(study),
        "choosing-retrieval": by_third(study, [(*column, RETRIEVAL) for column in CHOICES]),
        "choosing-classes": by_third(study, [(*column, CLASSES) for column in CHOICES]),
        "choosing-two": by_third(
            study,
            [
                ("`3t-main`", "3t-main", RETRIEVAL),
                ("its combination", "3t-main", "combination/mean_r@1"),
                ("scores of baseline and LiT averaged", "3t-main", "control/mean_r@1"),
            ],
        ),
        "choosing-budgets": by_steps(study),
        "schedules": schedules(study),
        "weightings": by_third(
            study,
            [
                (f"`{label}`: {what}", label, metric)
                for what, metric in (("mean R@1", RETRIEVAL), ("zero-shot", CLASSES))
                for label in ("3t", "3t-main")
            ],
        ),
    }


def claims(study: dict[str, Any]) -> str:
    """The verdict on every claim of the study; how far the study is while there is none."""
    judged = study.get("claims") or ()
    if not judged:
        done = sum(row["done"] for row in study["progress"])
        return f"No claim is judged yet: {done:,} of {sum(row['total'] for row in study['progress']):,} runs are done."
    return markdown(("claim", "verdict"), ((title(claim), f"**{claim['verdict']}**") for claim in judged))


def by_third(study: dict[str, Any], columns: Sequence[tuple[str, str, str]]) -> str:
    """Figures of the study by third tower, as "mean [95 % interval]" in %; a dash where a method was not run with it.

    columns: the heading, the label of the method and the metric of each.
    """
    found = {
        (row["label"], row["third"] or third): row["metrics"] for row in study["methods"] for third in THIRDS
    }
    rows = [
        (third, *(_percent(found.get((label, third), {}).get(metric)) for _, label, metric in columns))
        for third in THIRDS
    ]
    return markdown(("third tower", *(head for head, _, _ in columns)), rows)


def schedules(study: dict[str, Any]) -> str:
    """Constant weights and schedules of them among the ablations of the study, beside 3T with the paper's."""
    found = {row["label"]: row for row in study["ablations"]}
    rows = [
        (heading, _percent(found[label]["score"]), _percent(found[label].get("difference"), "+"))
        for heading, label in SCHEDULES
    ]
    return markdown(("weights", "mean R@1", "difference to 1/3 each"), rows)


def by_steps(study: dict[str, Any]) -> str:
    """Mean R@1 of the study's longer runs by their training steps, as `by_third` writes it."""
    found = {(row["label"].split()[0], row["steps"]): row["score"] for row in study["budgets"]}
    methods = [(heading, label) for heading, label in CHOICES if any(label == given for given, _ in found)]
    rows = [
        (f"{steps:,}", *(_percent(found.get((label, steps))) for _, label in methods))
        for steps in sorted({steps for _, steps in found})
    ]
    return markdown(("steps", *(heading for heading, _ in methods)), rows)


def _percent(cell: dict[str, float] | None, signed: str = "") -> str:
    """ "mean [low, high]" in %, without an interval for one seed. signed: "+" writes the sign of positive ones too."""
    if cell is None or cell["low"] == cell["high"] == 0:  # a method and itself
        return "–"
    mean, *ends = (
        f"{100 * cell[key]:{signed}.1f}" for key in ("mean", "low", "high") if cell[key] is not None
    )
    return f"{mean} [{', '.join(ends)}]".replace("-", "−") if ends else mean


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a vertical bar inside a cell is escaped.

    >>> print(markdown(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    first, *others = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, *rows))
    return "\n".join([f"| {first} |", "|---" * len(head) + "|", *(f"| {line} |" for line in others)])


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _objectives() -> dict[str, Objective]:
    return {name: objective(RunConfig(method=name, third=("timm:NAME",))) for name in get_args(Method)}


def _rows(table: Objective) -> str:
    """The rows of an objective: a dot between views that are contrasted, an arrow from a prediction to its target."""
    return ", ".join(f"{row.a} {'·' if LOSSES[row.kind].contrastive else '→'} {row.b}" for row in table.rows)


def _weights(table: Objective) -> str:
    """The weights of the rows, in their order."""
    weights = table.weights(0)
    if len(weights) > 1 and len(set(weights)) == 1:
        return f"1/{1 / weights[0]:.0f} each"
    return ", ".join(f"{weight:g}" for weight in weights)


def filled(text: str, known: dict[str, str]) -> str:
    """A document's text with every marked table replaced; raises KeyError for a name that is not in `known`."""
    return MARKED.sub(lambda found: f"{found[1]}{known[found[2]]}\n{found[3]}", text)


def main(words: Sequence[str]) -> int:
    """Writes or checks the documents; returns the exit code."""
    known, outdated = tables(), []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if filled(text, known) != text:
            outdated.append(path.relative_to(ROOT))
            if "--check" not in words:
                path.write_text(filled(text, known), encoding="utf-8")
    if "--check" in words:
        print(
            "".join(f"{path}: a table differs from the code; run `make docs`\n" for path in outdated), end=""
        )
        return 1 if outdated else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
