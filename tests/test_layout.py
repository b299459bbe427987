"""Rules that a reviewer would have to remember, as tests."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from threetowers import config as config_module
from threetowers.cli import VERBS

SOURCE = Path(__file__).parents[1] / "src" / "threetowers"
ROOT = SOURCE.parents[1]

# From the ground up. A part may import parts that stand before its line, never one beside it or behind it.
ORDER = [
    {"errors", "progress", "files", "paths", "system"},
    {"heartbeats"},
    {"config", "processes"},
    {"settings"},
    {"data", "objective", "recipes"},
    {"towers", "world"},
    {"model", "store"},
    {"run"},
    {"evaluate"},
    {"export"},
    {"train"},
    {"compare", "commands"},
    {"reproduce", "explore"},
    {"cli"},
    {"__main__"},
]
REPORT_READS = {"errors", "progress", "files", "objective.pairs"}
"""What report/ imports: it reads files, and of the package nothing but plain data."""
LONGEST_FILE = 400
"""Lines; about what is read in one sitting."""

FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in FILES
}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it: at its top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports name the whole module"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {
        name.removeprefix("threetowers").removeprefix(".") for name in found if name.startswith("threetowers")
    }
    return {name for name in names if name and name in MODULES}


def part(module: str) -> str:
    """The package or module right below `threetowers` that a module belongs to."""
    return module.partition(".")[0]


def rank(name: str) -> int:
    return next(i for i, names in enumerate(ORDER) if name in names)


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part(module) for module in MODULES} - {""} == {*set().union(*ORDER), "report"}


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_point_one_way(module: str) -> None:
    own = part(module)
    for name in imports(MODULES[module]):
        if own == "report":
            assert part(name) == "report" or name in REPORT_READS | {part(each) for each in REPORT_READS}
        elif part(name) == "report":
            assert own == "cli", "who makes a report asks for it on the command line"
        elif part(name) != own:
            assert rank(part(name)) < rank(own), f"{module} may not import {name}"


def test_no_circle_of_files() -> None:
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()
    while ready := [module for module, needs in graph.items() if module not in done and needs <= done]:
        done |= set(ready)
    assert not graph.keys() - done, f"in a circle, or above one: {sorted(graph.keys() - done)}"


def test_nothing_in_data_imports_its_roof() -> None:
    users = {module for module, path in MODULES.items() if "data.open" in imports(path)}
    assert not {module for module in users if part(module) == "data"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom threetowers.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'timm', 'open_clip', 'torchvision', 'transformers', 'scipy', 'matplotlib'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_the_report_never_imports_torch() -> None:
    program = (
        "import sys, threetowers.report.page, threetowers.report.tables\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def config_fields() -> list[tuple[str, str]]:
    classes = [c for c in vars(config_module).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]
    return [(c.__name__, f.name) for c in classes for f in dataclasses.fields(c)]


@pytest.mark.parametrize(("owner", "name"), config_fields())
def test_every_config_field_is_read_somewhere(owner: str, name: str) -> None:
    """An option without effect is a bug: its name must be read as an attribute outside config.py."""
    for path in FILES:
        if path.name == "config.py" and name != "third":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
                return
    pytest.fail(f"{owner}.{name} is read nowhere")


@pytest.mark.parametrize(
    "document",
    sorted(path for place in (".", "docs", "docs/howto", "examples") for path in (ROOT / place).glob("*.md")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_paths_and_targets_named_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert f"\n{target}:" in makefile, f"make {target}"
    for path in re.findall(r"`((?:src|docs|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link


def test_no_pickle_and_no_network_client_in_the_source() -> None:
    for path in FILES:
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        text = path.read_text(encoding="utf-8")
        barred = {
            "pickle",
            "requests",
            "urllib",
            "http",
            "socket",
            "shelve",
            "dill",
            "yaml",
            "huggingface_hub",
        }
        if path.name == "convert.py":  # the one place that opens foreign pickles, for tensors alone
            barred -= {"pickle"}
            calls = re.findall(r"torch\.load\([a-z]+,[^)]*\)", text)
            assert calls and all("weights_only=True" in call for call in calls)
            assert not re.search(r"pickle\.(loads?|Unpickler)\b", text)
        else:
            assert "torch.load(" not in text, path
        if path.name == "sets.py":  # DataComp's list of tasks is YAML
            barred -= {"yaml"}
            assert set(re.findall(r"yaml\.(\w*load\w*)", text)) == {"safe_load"}
        if (
            path.name == "hub.py"
        ):  # looks up the Hub's address, for names that are on it, and connects to nothing
            barred -= {"huggingface_hub", "socket", "urllib"}
            assert "from huggingface_hub import constants\n" in text
            assert set(re.findall(r"socket\.(\w+)", text)) == {"getaddrinfo"}
        if path.name == "push.py":  # the one place that sends files, once the user has agreed
            barred -= {"huggingface_hub"}
        if path.name == "card.py":
            barred -= {"huggingface_hub"}
            assert "from huggingface_hub import EvalResult, ModelCardData\n" in text, (
                "which open no connection"
            )
        assert not names & barred, path
        assert not re.search(r"(?<![.\w])(eval|exec)\(|os\.system|shell=True|trust_remote_code=True", text), (
            path
        )
