"""Guards stand in the source where tests/guards.py takes them away, and their removal is noticed."""

import ast
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import guard_kit
import guards
from guard_kit import Guard

BY_NAME = {guard.name: (file, guard) for file, guard in guards.every()}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_guard_stands_in_the_source_once_and_its_test_exists(name: str) -> None:
    file, guard = BY_NAME[name]
    ast.parse(guard_kit.removed(file, guard))
    path, _, test = guard.test.partition("::")
    source = (Path(__file__).parent / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {test.partition('[')[0]}\(", source, re.MULTILINE)


def test_the_guards_are_many_and_the_page_shows_them_all() -> None:
    """`python tests/guards.py` has been run since a guard was added."""
    page = guards.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([a-z0-9-]+) \| .* \| `(test_\w+\.py::[^`]+)` \|", page, re.MULTILINE)
    assert sorted(shown) == sorted((guard.name, guard.test) for _, guard in guards.every())
    assert len(BY_NAME) == len(shown) >= 28
    assert "stays green" not in page


def test_a_removal_is_noticed() -> None:
    outcome = guard_kit.tried(*BY_NAME["zero-vectors"])
    assert outcome.red and outcome.says.startswith("assert"), outcome


def test_a_harmless_change_is_not() -> None:
    file, guard = BY_NAME["zero-vectors"]
    outcome = guard_kit.tried(file, replace(guard, new=f"({guard.old})"))
    assert not outcome.red and outcome.says == "stays green", outcome


@pytest.mark.parametrize(
    ("code", "output", "hangs", "red"),
    [
        (1, "FAILED tests/test_x.py::test_y[a b] - AssertionError: it is 3", False, True),
        (1, "FAILED tests/test_x.py::test_y - Failed: DID NOT RAISE <class 'ValueError'>", False, True),
        (1, "FAILED tests/test_x.py::test_y - NameError: name 'losses' is not defined", False, False),
        (1, "FAILED tests/test_x.py::test_y - ImportError: cannot import name 'unit'", False, False),
        (1, "ERROR tests/test_x.py::test_y - ValueError: in a fixture", False, False),
        (1, "not the copy: /somewhere/else", False, False),
        (2, "ERROR tests/test_x.py - SyntaxError: invalid syntax", False, False),
        (-9, "", False, False),
        (None, "", False, False),
        (None, "", True, True),
    ],
)
def test_only_a_failure_of_the_test_itself_counts(
    code: int | None, output: str, hangs: bool, red: bool
) -> None:
    guard = Guard("name", "", "", "", "test_x.py::test_y", hangs=hangs)
    assert guard_kit.judge(guard, code, output, Path("/tree"))[0] == red


@pytest.mark.slow
def test_every_removal_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = guard_kit.try_all(list(guards.every()), lambda *_: None)
    missed = [
        (guard.name, outcome.says)
        for (_, guard), outcome in zip(guards.every(), outcomes, strict=True)
        if not outcome.red
    ]
    assert missed == []
    with capsys.disabled():
        print(f"\n{len(outcomes)} removals, all noticed", file=sys.stderr)
