"""Writes docs/benchmarks.md from what the benchmarks left in runs/bench.

    python benchmarks/page.py [--folder runs/bench] [--out docs/benchmarks.md]

Each JSON file becomes a section: the head of its script, its machine, and its tables, each after a sentence of the
script's TABLES. Benchmarks without a JSON file keep the figures that stand on the page, so that one can be run alone.
"""

import argparse
import ast
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LONGEST = 40  # rows; a longer table stays in its JSON
LEFT_OUT = {"command", "options", "rounds", "losses", "by_its_own_log"}  # what only the JSON needs
INTRODUCTION = """# Benchmarks

Written by `benchmarks/page.py` out of the JSON that each script leaves; `make bench` runs the set and writes this page.
Contenders take turns in one process (or in fresh ones, where memory or start-up is measured); a rate is the fastest
round on a CPU and the median on a GPU, and every ratio is to a peer of the same run. Peers are imported as they are
published. Machines differ: compare ratios, not times.
"""


@dataclass(frozen=True)
class Aim:
    """A figure out of one benchmark's JSON, and what it is meant to be: at least so much, or at most."""

    what: str
    benchmark: str
    figure: Callable[[dict[str, Any]], float]
    aim: float
    most: bool = False


def _rate(result: dict[str, Any], contender: str) -> float:
    """Samples per second of the contenders whose name begins so, the fastest."""
    named = [row for row in result["rows"] if row["contender"].startswith(contender)]
    return max(float(row["samples_per_second"]) for row in named)


def _times(ours: str, theirs: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: _rate(result, ours) / _rate(result, theirs)


def _memory(result: dict[str, Any], num: int) -> dict[str, float]:
    """MiB by loss at a number of samples; raises KeyError when it was not measured."""
    found: dict[str, float] = {row["num"]: row for row in result["memory"]}[num]
    return found


def _answers(result: dict[str, Any], num: int, contender: str, figure: str) -> float:
    """The highest figure at N images, or the lowest time; raises KeyError when it was not measured."""
    found = [float(row[figure]) for row in result["rows"] if (row["N"], row["contender"]) == (num, contender)]
    if not found:
        raise KeyError(num)
    return max(found) if figure == "per second" else min(found)


def _three_towers(result: dict[str, Any], loss: str, figure: str) -> float:
    """The figure of a loss for 3T over 4 processes; raises KeyError when it was not measured."""
    wanted = (loss, "3T", 4)
    found = [
        float(row[figure])
        for row in result["rows"]
        if (row["loss"], row["method"], row["processes"]) == wanted
    ]
    if not found:
        raise KeyError(wanted)
    return found[0]


def _least(result: dict[str, Any], contender: str, figure: str) -> float:
    """The lowest figure of a contender; raises KeyError when it was not measured."""
    found = [float(row[figure]) for row in result["rows"] if row["contender"] == contender]
    if not found:
        raise KeyError(contender)
    return min(found)


def _lost(save: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: statistics.mean(row["lost"] for row in result["rows"] if row["save"] == save)


AIMS = (
    Aim("three contrastive rows in fp32, times as fast as ClipLoss three times", "loss",
        lambda result: result["speed"][0]["ratio"], 1.9),
    Aim("their worst gradient error in fp32", "loss",
        lambda result: result["worst_errors"][0]["worst_gradient_error"], 5e-6, most=True),
    Aim("their extra memory at N = 8,192, times less than ClipLoss's", "loss",
        lambda result: _memory(result, 8_192)["ClipLoss"] / _memory(result, 8_192)["ours"], 10),
    Aim("their extra memory at N = 65,536, MiB", "loss",
        lambda result: _memory(result, 65_536)["ours"], 1_430, most=True),
    Aim("a 3T step with stored features, times as fast as open_clip's CLIP step", "step",
        _times("ours 3T stored, autocast", "open_clip CLIP"), 1.6),
    Aim("a 3T step with a live frozen tower, times as fast as one of open_clip's parts", "step",
        _times("ours 3T live, autocast, trimmed", "3T of open_clip parts"), 2.3),
    Aim("a 3T step of 4,096 in micro-batches of 256, times as fast as with accum-freq", "accumulate",
        _times("ours, 3T", "open_clip accum-freq, 3T"), 2.0),
    Aim("its gradients' error against the whole batch", "accumulate",
        lambda result: result["errors"]["whole batch"], 1e-6, most=True),
    Aim("`train` 3T with stored features, times as fast as open_clip_train's CLIP", "e2e",
        _times("ours 3T stored", "open_clip CLIP"), 1.5),
    Aim("time lost to a checkpoint a minute, saved in the loop", "checkpoint", _lost("in the loop"), 0.15, most=True),
    Aim("and saved in a thread", "checkpoint", _lost("in a thread"), 0.05, most=True),
    Aim("`explore`: answers a second over 100,000 images", "explore",
        lambda result: _answers(result, 100_000, "main pair", "per second"), 50),
    Aim("the same with the combination, whose vectors are twice as wide", "explore",
        lambda result: _answers(result, 100_000, "combination", "per second"), 50),
    Aim("`explore`: ms for a move of α over 10,000 images", "explore",
        lambda result: _answers(result, 10_000, "α moves", "median ms"), 100, most=True),
    Aim("exact search, times as fast as faiss's flat index on the least suitable vectors", "search",
        lambda result: _least(result, "faiss", "ratio"), 2.0),
    Aim("3T over 4 processes, times fewer bytes than an exact ClipLoss three times", "processes",
        lambda result: _three_towers(result, "ClipLoss, G", "kB") / _three_towers(result, "ours", "kB"), 4),
    Aim("3T over 4 processes, collectives of a step", "processes",
        lambda result: _three_towers(result, "ours", "collectives"), 3, most=True),
)  # fmt: skip


def summary(results: dict[str, dict[str, Any]], kept: dict[str, str]) -> str:
    """The table of aims, each with its figure and whether it holds; `kept`: rows of the page before, by their aim."""
    lines = [
        "## In short",
        "",
        "Each row is a figure of a benchmark below, its aim, and whether the aim holds.",
        "",
        "| what | figure | aim | |",
        "|---|---|---|---|",
    ]
    for aim in AIMS:
        if aim.benchmark not in results:
            if aim.what in kept:
                lines.append(kept[aim.what])
            continue
        try:
            found = aim.figure(results[aim.benchmark])
        except KeyError:
            continue  # not measured
        holds = found <= aim.aim if aim.most else found >= aim.aim
        bound = f"{'at most' if aim.most else 'at least'} {_cell(float(aim.aim))}"
        lines.append(f"| {aim.what} | {_cell(found)} | {bound} | {'held' if holds else '**not held**'} |")
    return "\n".join(lines)


def section(name: str, result: dict[str, Any]) -> str:
    """One benchmark's part of the page, from its JSON."""
    tables = {key: value for key, value in result.items() if _is_table(value)}
    plain = {
        key: value
        for key, value in result.items()
        if key not in tables and key not in LEFT_OUT and key != "machine" and value != []
    }
    settings = ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in plain.items())
    parts = [*_head(name), _machine(result.get("machine", {})), f"Settings: {settings}" if settings else ""]
    shown = [key for key, value in tables.items() if len(value) <= LONGEST]
    for key in shown:
        label = "" if key == "rows" == shown[0] else f"**{key.replace('_', ' ')}**"
        parts += [label, _sentence(name, key), _table(tables[key])]
    return "\n\n".join(part for part in parts if part)


def kept_section(name: str, text: str) -> str:
    """A section of the page before: its figures as they are, the words about them from the script as it is today."""
    parts, key = _head(name), "rows"
    for part in text.split("\n\n"):
        if part.startswith(("Machine: ", "Settings: ")):
            parts.append(part)
        elif part.startswith("**"):
            parts.append(part)
            key = part.strip("*").replace(" ", "_")
        elif part.startswith("|"):
            parts += [_sentence(name, key), part]
    return "\n\n".join(parts)


def page(results: dict[str, dict[str, Any]], before: str) -> str:
    """The whole page; `before` is the one that stands, whose sections are kept where there is no JSON."""
    sections = {text.partition("\n")[0]: text.strip() for text in before.split("\n## ")[1:]}
    rows = (line for line in sections.get("In short", "").splitlines() if line.startswith("| "))
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in rows}
    parts = [INTRODUCTION.rstrip(), summary(results, kept)]
    for name in sorted(script.stem for script in HERE.glob("*.py")):
        if name in results:
            parts.append(section(name, results[name]))
        elif name in sections:
            parts.append(kept_section(name, sections[name]))
    return "\n\n".join(parts) + "\n"


def _script(name: str) -> ast.Module:
    return ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))


def _head(name: str) -> list[str]:
    """Heading, first sentence and command of a script's docstring."""
    title, _, rest = (ast.get_docstring(_script(name)) or name).partition("\n")
    command = next((line.strip() for line in rest.splitlines() if line.startswith("    python")), "")
    return [f"## {name}", title, *([f"`{command}`"] if command else [])]


def _sentence(name: str, key: str) -> str:
    """What a script's TABLES says of a table; raises KeyError when it says nothing."""
    for node in _script(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TABLES":
            return str(ast.literal_eval(node.value)[key])
    raise KeyError(f"{name}.py has no TABLES")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _machine(values: dict[str, Any]) -> str:
    return "Machine: " + ", ".join(f"{key} {_cell(value)}" for key, value in values.items()) if values else ""


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in LEFT_OUT))
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    paths = [path for path in sorted(arguments.folder.glob("*.json")) if (HERE / f"{path.stem}.py").is_file()]
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    before = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else ""
    arguments.out.write_text(page(results, before), encoding="utf-8")
    print(f"written: {arguments.out}, {len(results)} benchmarks, the others as they were")


if __name__ == "__main__":
    main()
