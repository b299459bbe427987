"""Writes docs/benchmarks.md from what the benchmarks left in runs/bench.

    python benchmarks/page.py [--folder runs/bench] [--out docs/benchmarks.md]

Each JSON file becomes a section: the head of its script, its machine, and its tables as they are.
"""

import argparse
import ast
import json
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


def section(path: Path) -> str:
    """One benchmark's part of the page."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    script = HERE / f"{path.stem}.py"
    head = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or path.stem
    title, _, rest = head.partition("\n")
    command = next((line.strip() for line in rest.splitlines() if line.startswith("    python")), "")
    parts = [f"## {path.stem}", title, f"`{command}`" if command else "", _machine(result.pop("machine", {}))]
    plain = {key: value for key, value in result.items() if not _is_table(value) and key not in LEFT_OUT}
    settings = ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in plain.items())
    parts.append(settings)
    for key, value in result.items():
        if _is_table(value) and len(value) <= LONGEST:
            parts += [f"**{key.replace('_', ' ')}**" if key != "rows" else "", _table(value)]
    return "\n\n".join(part for part in parts if part)


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
    found = [path for path in sorted(arguments.folder.glob("*.json")) if (HERE / f"{path.stem}.py").is_file()]
    arguments.out.write_text(
        "\n\n".join([INTRODUCTION.rstrip(), *map(section, found)]) + "\n", encoding="utf-8"
    )
    print(f"written: {arguments.out}, {len(found)} benchmarks")


if __name__ == "__main__":
    main()
