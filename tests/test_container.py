"""The Dockerfile names what is there: its sources, its version of Python, its commands and its layers in order."""

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its words; comments are left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


def copied() -> list[str]:
    return [source for name, words in instructions() if name == "COPY" for source in words.split()[:-1]]


def is_sent(path: str) -> bool:
    """Whether the .dockerignore lets a path through; as in Docker, the last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, name = line.removeprefix("!"), path
        if pattern.startswith("**/"):
            pattern, name = pattern.removeprefix("**/"), path.rsplit("/", 1)[-1]
        if fnmatch(name, pattern) or fnmatch(path, f"{pattern}/*"):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_exists_and_is_sent_to_docker(source: str) -> None:
    assert (ROOT / source).exists() and is_sent(source)


def test_nothing_else_is_sent_to_docker() -> None:
    for name in (
        ".git",
        ".venv",
        "runs",
        "data",
        "docs",
        "tests",
        "src/threetowers/__pycache__",
        "src/x.egg-info",
    ):
        assert not is_sent(name), name
    assert is_sent("src/threetowers/data/order.py") and is_sent("src/threetowers/explore/page/index.html")


def test_everything_that_the_package_is_built_from_is_copied() -> None:
    files = [PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"]
    assert sorted(copied()) == sorted(files)


def test_the_image_has_a_python_that_the_package_takes() -> None:
    ((_, image),) = [each for each in instructions() if each[0] == "FROM"]
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version and version[1] in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]


def test_the_dependencies_are_a_layer_before_the_source(tmp_path: Path) -> None:
    """The program that lists them is run on pyproject.toml alone, which is all that its layer depends on."""
    names = [f"{name} {words}" for name, words in instructions()]
    listing = next(i for i, line in enumerate(names) if line.startswith("RUN python -c"))
    assert [line for line in names[:listing] if line.startswith("COPY")] == ["COPY pyproject.toml ./"]
    words = shlex.split(names[listing])
    assert words[3] and words[4:] == [
        ">", "requirements.txt", "&&", "pip", "install", "--no-cache-dir", "--requirement", "requirements.txt"
    ]  # fmt: skip
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", words[3]], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    found = [Requirement(line) for line in done.stdout.splitlines()]
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["explore"]
    assert found == [Requirement(line) for line in wanted]


def test_it_runs_the_demo_as_an_ordinary_user() -> None:
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["threetowers"]' and "threetowers" in PROJECT["scripts"]
    assert last["CMD"] == '["demo"]'
    assert last["USER"] == "threetowers" and last["WORKDIR"] == "/work"
