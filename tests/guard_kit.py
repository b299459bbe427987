"""How a guard is removed in a copy of the tree, and what counts as its test noticing that."""

import ast
import difflib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from guard_edits import Edit, edited

ROOT = Path(__file__).parent.parent
PACKAGE = Path("src", "threetowers")
COPIED = ("src", "tests", "pyproject.toml")
SECONDS = 300.0
"""How long a test may take."""
PRELOADED = ["torch", "torchvision.transforms.v2", "timm", "open_clip", "scipy.stats", "pytest"]
"""What every test imports; imported once, in the process from which those of the tests are forked."""
BESIDE_THE_MATTER = re.compile(
    r"(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError|UnboundLocalError)\b"
)
NOT_THE_COPY = 99


@dataclass(frozen=True)
class Guard:
    """A condition of the source, the edits that remove it, and the test that must fail then.

    without: what the source does then. function: qualified name, as for `guard_edits.edited`.
    """

    name: str
    without: str
    function: str
    edits: Edit | tuple[Edit, ...]
    test: str


@dataclass(frozen=True)
class Outcome:
    """Whether the test failed as it should, what it said, and how long it took."""

    red: bool
    says: str
    seconds: float


def removed(guard: Guard, tree: Path = ROOT) -> tuple[Path, str]:
    """The file of the tree that holds the guard, and its text without it.

    Raises ValueError, with the guard's name, unless each of its places is found exactly once.
    """
    edits = guard.edits if isinstance(guard.edits, tuple) else (guard.edits,)
    try:
        return edited(tree / PACKAGE, guard.function, edits)
    except ValueError as error:
        raise ValueError(f"guard {guard.name}: {error}") from error


def difference(guard: Guard, tree: Path = ROOT) -> str:
    """What a removal changes, as a unified diff of the source without its comments."""
    path, text = removed(guard, tree)
    before = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
    name = str(path.relative_to(tree))
    return "\n".join(
        difflib.unified_diff(before.splitlines(), text.splitlines(), name, name, lineterm="", n=1)
    )


def copy(tree: Path, source: Path = ROOT) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source / name, tree / name, ignore=ignored)
        else:
            shutil.copy(source / name, tree / name)
    return tree


def run(tree: Path, tests: Sequence[str], seconds: float = SECONDS) -> tuple[int | None, str]:
    """Runs tests of a tree on its own source; the exit code, None when they do not end, and what is printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_pytest, args=(tree, tests))
    process.start()
    process.join(seconds)
    code = process.exitcode
    if code is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, (tree / "output").read_text(encoding="utf-8", errors="replace")


def _run_pytest(tree: Path, tests: Sequence[str]) -> None:
    """The body of a test's process; its group ends with it."""
    os.setsid()
    os.chdir(tree)
    multiprocessing.set_start_method(None, force=True)  # what a process that pytest starts would have
    output = os.open("output", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"PYTHONPATH": str(tree / "src"), "COLUMNS": "1000"}
    own = Path(__file__).parent
    sys.path[:] = [str(tree / "src"), *(place for place in sys.path if Path(place).resolve() != own)]
    import threetowers

    if not Path(threetowers.__file__).is_relative_to(tree):
        print(f"not the copy: {threetowers.__file__}", flush=True)
        os._exit(NOT_THE_COPY)
    import pytest

    options = [
        "-x",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        f"--basetemp={tree / 'tmp'}",
    ]
    sys.exit(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def judge(code: int | None, output: str, tree: Path) -> tuple[bool, str]:
    """Whether the test noticed the removal, and what it said; an error beside the matter is no notice."""
    if code is None:
        return False, "does not end"
    failed = re.search(r"^FAILED \S.*? - (.+)$", output, re.MULTILINE)
    if code == 0:
        return False, "passes"
    if code != 1 or failed is None or BESIDE_THE_MATTER.match(failed[1]):
        return False, "is no failure of the test: " + " ".join(output.splitlines()[-3:])
    says = failed[1].replace(f"{tree}/", "").removeprefix("AssertionError: ")
    says = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", says)
    return True, re.sub(r"[\d.,]+/s\b|(?<=\(pid\(s\) )\d+", "…", says)


def tried(guard: Guard, whole: Path = ROOT) -> Outcome:
    """Removes a guard in a copy of the tree and runs its test."""
    begun = time.monotonic()
    # processes that outlive a test without its guard may still write there
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        tree = copy(Path(name).resolve(), whole)
        path, text = removed(guard, whole)
        (tree / path.relative_to(whole)).write_text(text, encoding="utf-8")
        red, says = judge(*run(tree, [guard.test]), tree)
    return Outcome(red, says, time.monotonic() - begun)


def try_all(guards: Sequence[Guard], report: Callable[[Guard, Outcome], None]) -> dict[str, Outcome]:
    """The outcome of each removal by the guard's name; raises RuntimeError when a test fails without any removal."""
    for guard in guards:
        removed(guard)
    num_processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(num_processes) as pool:
        whole = copy(Path(name).resolve())  # the tree may change meanwhile
        tests = sorted({guard.test for guard in guards})
        green = pool.submit(run, whole, tests, SECONDS * len(tests))

        def attempt(guard: Guard) -> tuple[str, Outcome]:
            outcome = tried(guard, whole)
            report(guard, outcome)
            return guard.name, outcome

        outcomes = dict(pool.map(attempt, guards))
        code, output = green.result()
    if code != 0:
        raise RuntimeError(f"with all guards in place:\n{output}")
    return outcomes
