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

# A module may import modules of its own rank or below it; the names are packages or modules under threetowers.
RANKS = [
    {"errors", "progress", "files"},
    {"config"},
    {"data", "objective"},
    {"towers", "world"},
    {"model", "store"},
    {"run"},
    {"evaluate", "export"},
    {"train"},
    {"compare", "commands", "recipes"},
    {"cli"},
]


def rank(name: str) -> int:
    return next(i for i, names in enumerate(RANKS) if name in names)


def imports(path: Path) -> set[str]:
    """The threetowers packages or modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("threetowers"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("threetowers.")
            }
    return {name for name in found if not name.startswith("__")}


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "report":
        assert imports(path) <= {"report", "errors", "progress", "files", "objective"}, (
            "report/ reads files and the list of methods, nothing else"
        )
        return
    for name in imports(path) - {own}:
        if name == "report":
            assert own == "cli"
            continue
        assert rank(name) <= rank(own), f"{own} may not import {name}"


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
    "document", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
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
        barred = {"pickle", "requests", "urllib", "http", "socket", "shelve", "dill", "yaml"}
        if path.name == "convert.py":  # the one place that opens foreign pickles, for tensors alone
            barred -= {"pickle"}
            calls = re.findall(r"torch\.load\([a-z]+,[^)]*\)", text)
            assert calls and all("weights_only=True" in call for call in calls)
            assert not re.search(r"pickle\.(loads?|Unpickler)\b", text)
        else:
            assert "torch.load(" not in text, path
        assert not names & barred, path
        assert not re.search(r"(?<![.\w])(eval|exec)\(|os\.system|shell=True|trust_remote_code=True", text), (
            path
        )
