"""The paper's claims on the built-in world, over seeds; writes docs/claims/ and docs/claims.md.

    python benchmarks/claims.py [--out runs/claims] [--seeds 0 1 2] [--steps 500] [--docs docs]

Stopped and started again it continues. About an hour on two cores; progress is shown throughout. Runs train side by
side with one thread each: towers this small gain little from a second one.
"""

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the workers

from threetowers.compare.demo import demo
from threetowers.config import CompareConfig
from threetowers.objective.pairs import METHODS
from threetowers.recipes import PRESETS
from threetowers.report.page import write_report
from threetowers.report.tables import text_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKS = {True: "held", False: "**not held**", None: "not tested"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=500, help="steps of every run")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="where the document and its folder are written"
    )
    arguments = parser.parse_args()
    config = replace(PRESETS["shapes"](), steps=arguments.steps)
    options = CompareConfig(
        methods=tuple(METHODS),
        seeds=tuple(arguments.seeds),
        lrs=tuple(arguments.lrs),
        title="The claims of Three Towers on the built-in world",
    )
    result = demo(config, options, arguments.out, jobs=0)
    if result is None:
        sys.exit("stopped; the same command continues")
    page = write_report(arguments.out)
    folder = arguments.docs / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(page, folder / "report.html")
    shutil.copy(arguments.out / "compare.json", folder / "compare.json")
    (arguments.docs / "claims.md").write_text(_document(result), encoding="utf-8")
    print(f"{text_table(result)}\n\nwritten: {arguments.docs / 'claims.md'}, {folder / 'report.html'}")


def _document(result: dict[str, Any]) -> str:
    """docs/claims.md: the settings, the claims and the table, every figure from compare.json."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        "# The claims, on the built-in world",
        "",
        "Written by `make claims` (`benchmarks/claims.py`); the page with curves and examples is",
        "[claims/report.html](claims/report.html), the figures are [claims/compare.json](claims/compare.json).",
        "",
        f"{settings['num_train']:,} training pairs of 32 px, {settings['steps']} steps of {settings['batch_size']}, "
        f"seeds {', '.join(map(str, settings['seeds']))}; learning rate per method from "
        f"{', '.join(f'{lr:g}' for lr in settings['lrs'])} on validation with seed {settings['lr_seed']}. "
        f"{settings['num_test']:,} test images. Machine: {machine['cpu']}, {machine['cores']} cores, torch "
        f"{machine['torch']}. Intervals are 95 % t-intervals over seeds; differences are paired by seed.",
        "",
        "| claim | | difference in points [95 %] |",
        "|---|---|---|",
    ]
    for claim in result["claims"]:
        figures = "; ".join(f"{name}: {value}" for name, value in claim["figures"].items()) or claim["note"]
        lines.append(f"| {claim['id']}: {claim['text']} | {MARKS[claim['held']]} | {figures} |")
    lines += [
        "",
        "| method | learning rate | mean R@1 [95 %] | combination | zero-shot top-1 |",
        "|---|---|---|---|---|",
    ]
    for method in result["methods"]:
        cells = [
            _cell(result, method, task, metric)
            for task, metric in (
                ("retrieval", "mean_r@1"),
                ("combination", "mean_r@1"),
                ("zero_shot", "top1"),
            )
        ]
        lines.append(f"| {method['label']} | {method['lr']:g} | {' | '.join(cells)} |")
    alphas = [f"{row['third']} {row['alpha']:g} (seed {row['seed']})" for row in result["combination"]]
    lines += ["", f"α chosen on validation: {', '.join(alphas)}.", ""]
    return "\n".join(lines)


def _cell(result: dict[str, Any], method: dict[str, Any], task: str, metric: str) -> str:
    for row in result["summary"]:
        if all(row[key] == method[key] for key in ("method", "third")) and (row["task"], row["metric"]) == (
            task,
            metric,
        ):
            mean, low, high = (row[key] for key in ("mean", "low", "high"))
            return f"{mean:.1%}" if low is None else f"{mean:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    return "–"


if __name__ == "__main__":
    main()
