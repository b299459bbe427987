"""How a guard is taken away in a copy of the tree, and what counts as its test noticing that."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "pyproject.toml")
TRIES = min(os.cpu_count() or 1, 4)  # at the same time
SECONDS = 180.0

# `-m pytest` would test whatever package is installed if the copy were not found first
PROGRAM = """
import sys, pytest, threetowers
if not threetowers.__file__.startswith(sys.argv[1]):
    sys.exit(f"not the copy: {threetowers.__file__}")
sys.exit(pytest.main(sys.argv[2:]))
"""
SILLY = re.compile(
    r"(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError|UnboundLocalError)\b"
)


@dataclass(frozen=True)
class Guard:
    """Lines of a file in src/threetowers, what stands there without the guard, and the test that misses it.

    without: what the removal does. hangs: the test does not end then, which counts as red.
    """

    name: str
    without: str
    old: str
    new: str
    test: str
    hangs: bool = False


@dataclass(frozen=True)
class Outcome:
    """Whether the test went red as it should, what it said, and how long it took."""

    red: bool
    says: str
    seconds: float


def removed(file: str, guard: Guard, tree: Path = ROOT) -> str:
    """The text of the file without the guard; raises ValueError unless the guard stands there exactly once."""
    text = (tree / "src" / "threetowers" / file).read_text(encoding="utf-8")
    if text.count(guard.old) != 1:
        raise ValueError(f"{guard.name}: its text stands {text.count(guard.old)} times in {file}")
    return text.replace(guard.old, guard.new)


def copy(tree: Path, source: Path = ROOT) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(
                source / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(source / name, tree / name)
    return tree


def run(tree: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Runs tests of a tree on its own source; the exit code, None when they do not end, and what is printed."""
    nodes = [f"tests/{test}" for test in tests]
    options = ["-x", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={tree / 'tmp'}"]
    outer = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = outer | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    environment |= {
        "HF_HUB_OFFLINE": "1"
    }  # what must not be fetched fails at once and not after a minute of retries
    command = [sys.executable, "-c", PROGRAM, str(tree), *options, *nodes]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS if len(tests) == 1 else SECONDS * TRIES)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def judge(guard: Guard, code: int | None, output: str, tree: Path) -> tuple[bool, str]:
    """Whether the test noticed the removal, and what it said; an error beside the matter is no notice."""
    if code is None:
        return guard.hangs, "it hangs"
    failed = re.search(r"^FAILED \S.*? - (.+)$", output, re.MULTILINE)
    if code == 0:
        return False, "stays green"
    if code != 1 or failed is None or SILLY.match(failed[1]):
        return False, "is no failure of the test: " + " ".join(output.splitlines()[-3:])
    says = failed[1].replace(f"{tree}/", "").removeprefix("AssertionError: ")
    return True, re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", says)


def tried(file: str, guard: Guard, whole: Path = ROOT) -> Outcome:
    """Takes a guard away in a copy of the tree and runs its test."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        tree = copy(Path(name).resolve(), whole)
        (tree / "src" / "threetowers" / file).write_text(removed(file, guard, whole), encoding="utf-8")
        red, says = judge(guard, *run(tree, [guard.test]), tree)
    return Outcome(red, says, time.monotonic() - begun)


def try_all(guards: Sequence[tuple[str, Guard]], told: Callable[[Guard, Outcome], None]) -> list[Outcome]:
    """The outcome of each removal; raises RuntimeError when a test is red with all guards in place."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(TRIES) as pool:
        whole = copy(Path(name).resolve())  # the tree may change meanwhile
        green = pool.submit(run, whole, sorted({guard.test for _, guard in guards}))

        def attempt(entry: tuple[str, Guard]) -> Outcome:
            outcome = tried(*entry, whole)
            told(entry[1], outcome)
            return outcome

        outcomes = list(pool.map(attempt, guards))
        code, output = green.result()
    if code != 0:
        raise RuntimeError(f"with all guards in place:\n{output}")
    return outcomes
