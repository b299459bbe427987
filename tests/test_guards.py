"""Edits of the syntax tree find their place, every guard stands in the source, and its removal can be noticed."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import guard_kit
import guards
from guard_edits import (
    Edit,
    always,
    argument,
    assigned,
    before,
    catch,
    compared,
    drop,
    drop_operand,
    edited,
    instead,
    never,
    read,
)
from guard_kit import Guard

GUARDS = list(guards.every())
BY_NAME = {guard.name: guard for guard in GUARDS}

Package = Callable[..., Path]


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Writes the source of a package; `save_py="…"` is the file save.py."""

    def write(**files: str) -> Path:
        folder = tmp_path / f"package-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("_py", ".py")).write_text(text, encoding="utf-8")
        return folder

    return write


def after(package: Package, lines: str, *edits: Edit) -> str:
    """The body of a function f(a, b) after the edits."""
    body = "\n    ".join(lines.splitlines())
    _, text = edited(package(one_py=f"def f(a, b):\n    {body}\n"), "f", edits)
    return "\n".join(line[4:] for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("lines", "edit", "expected"),
    [
        ("go()\n_sync(a)", drop("sync"), "go()\npass"),
        ("one.sync(a)\ntwo.sync(a)", drop("two.sync"), "one.sync(a)\npass"),
        ("sync(a)\nsync(b)", drop("sync", which=(2, 2)), "sync(a)\npass"),
        ("put(a, 'x')\nput(b, 'y')", drop("put", "y"), "put(a, 'x')\npass"),
        ("if a:\n    c = size(b)", before("size", "b.load()"), "if a:\n    b.load()\n    c = size(b)"),
        ("move(a, b)\ngo()", before("go", "move({move.1}, {move.0})"), "move(a, b)\nmove(b, a)\ngo()"),
        ("try:\n    go()\nexcept (A, B):\n    pass", catch("B"), "try:\n    go()\nexcept ():\n    pass"),
        ("try:\n    go()\nexcept A:\n    pass", catch("A", "C"), "try:\n    go()\nexcept C:\n    pass"),
        ("if a > 3:\n    go()\nif b < 3:\n    go()", never("<"), "if a > 3:\n    go()\nif False:\n    go()"),
        ("if a:\n    go()\nif b:\n    raise E('x')", never(raises="E"), "if a:\n    go()\nif False:\n    raise E('x')"),
        ("return {} if a.own else None", never("own"), "return {} if False else None"),
        ("if a < LIMIT:\n    return", always("LIMIT"), "if True:\n    return"),
        ("return a or b > MOST", drop_operand("MOST"), "return a"),
        ("return a and b and go()", drop_operand("go"), "return a and b"),
        ("return (a or b.x) and go()", drop_operand("x"), "return a and go()"),
        ("return ok(a) & ok(b)", drop_operand("ok", which=(2, 2)), "return ok(a)"),
        ("return size(a) != b", compared("len({})", "size"), "return len(size(a)) != len(b)"),
        ("go(a, safe=True)", argument("go", "safe", "False"), "go(a, safe=False)"),
        ("go(a, safe=True)", argument("go", "safe", None), "go(a)"),
        ("go(a)", argument("go", "safe", "False"), "go(a, safe=False)"),
        ("go(1, 2)", argument("go", 1, "{parameter.0}"), "go(1, a)"),
        ("go(1)", argument("go", 0, None), "go()"),
        ("return unit(a.x, b)", instead("unit", "{0} + {1}"), "return a.x + b"),
        ("a.log.warn(b, c=1)", instead("warn", "{of}.event({all})"), "a.log.event(b, c=1)"),
        ("return go(a)", instead("go", "{} * 0"), "return go(a) * 0"),
        ("return a.LIMIT[0]", read("LIMIT", "{}[1:]"), "return a.LIMIT[1:][0]"),
        ("a.x, a.y = (b - 1, b)", assigned("x", "0"), "a.x, a.y = (0, b)"),
    ],
)  # fmt: skip
def test_edits(lines: str, edit: Edit, expected: str, package: Package) -> None:
    assert after(package, lines, edit) == expected


@pytest.mark.parametrize(
    ("lines", "edit", "error"),
    [
        ("go()", drop("sync"), "0 statements that call sync"),
        ("c = sync()", drop("sync"), "0 statements that call sync"),
        ("sync(a)\nsync(b)", drop("sync"), "2 statements that call sync where 1"),
        ("sync(a)", drop("sync", which=(1, 2)), "1 statements that call sync where 2"),
        (
            "if a:\n    raise E\nif b:\n    raise E",
            never(raises="E"),
            "2 conditions on anything that raise E",
        ),
        ("if a:\n    if b:\n        raise E", never("a", raises="E"), "0 conditions on a that raise E"),
        ("return a + b", drop_operand("a"), "0 operands with a"),
        ("if False:\n    go(LIMIT)", never(), "changes nothing"),
        ("go(a)", argument("go", "safe", None), "0 arguments safe of go"),
    ],
)
def test_a_place_that_is_not_found_once_is_an_error(
    lines: str, edit: Edit, error: str, package: Package
) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        after(package, lines, edit)


def test_functions_are_found_by_as_much_of_their_name_as_is_needed(package: Package) -> None:
    source = "class C:\n    def save(self):\n        def go():\n            sync()\n        go()\n"
    folder = package(one_py=source, two_py="def save():\n    sync()\n\ndef _save():\n    go()\n")
    for name, file in (("C.save", "one.py"), ("save.go", "one.py"), ("two.save", "two.py")):
        path, text = edited(folder, name, [drop("sync")])
        assert path == folder / file and text.count("sync()") == 0
    assert edited(folder, "two._save", [drop("go")])[1].count("sync()") == 1
    for name, num in (("save", 2), ("three.save", 0)):
        with pytest.raises(ValueError, match=f"{num} functions called {name}"):
            edited(folder, name, [drop("sync")])


def test_line_breaks_comments_and_names_of_variables_do_not_matter(package: Package) -> None:
    edit = never("size", raises="OSError")
    plain = after(package, "if size(a) != b:\n    raise OSError", edit)
    other = after(package, "if (  # as written\n  a\n  != self.size(b)\n):\n    raise OSError", edit)
    assert plain == other == "if False:\n    raise OSError"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_guard_stands_in_the_source_once_and_its_test_exists(name: str) -> None:
    guard = BY_NAME[name]
    _, text = guard_kit.removed(guard)
    ast.parse(text)
    path, _, test = guard.test.partition("::")
    source = (Path(__file__).parent / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {test.partition('[')[0]}\(", source, re.MULTILINE)


def test_the_names_are_unique_and_the_page_shows_them_all() -> None:
    """`make guards` has been run since a guard was added."""
    page = guards.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([a-z0-9-]+) \| .* \| `(test_\w+\.py::[^`]+)` \|", page, re.MULTILINE)
    assert shown == [(guard.name, guard.test) for guard in GUARDS]
    assert len(BY_NAME) == len(GUARDS) >= 28


@pytest.mark.parametrize(
    ("code", "output", "red"),
    [
        (1, "FAILED tests/test_x.py::test_y[a b] - AssertionError: it is 3", True),
        (1, "FAILED tests/test_x.py::test_y - Failed: DID NOT RAISE <class 'ValueError'>", True),
        (1, "FAILED tests/test_x.py::test_y - NameError: name 'losses' is not defined", False),
        (1, "FAILED tests/test_x.py::test_y - ImportError: cannot import name 'unit'", False),
        (1, "ERROR tests/test_x.py::test_y - ValueError: in a fixture", False),
        (guard_kit.NOT_THE_COPY, "not the copy: /somewhere/else", False),
        (2, "ERROR tests/test_x.py - SyntaxError: invalid syntax", False),
        (-9, "", False),
        (None, "", False),
    ],
)
def test_only_a_failure_of_the_test_itself_counts(code: int | None, output: str, red: bool) -> None:
    assert guard_kit.judge(code, output, Path("/tree"))[0] == red


@pytest.mark.slow
def test_a_removal_is_noticed_and_a_harmless_change_is_not() -> None:
    guard = BY_NAME["zero-vectors"]
    outcome = guard_kit.tried(guard)
    assert outcome.red and outcome.says.startswith("assert"), outcome
    harmless = Guard(
        "harmless", "nothing changes", guard.function, instead("normalize", "{} * 1"), guard.test
    )
    outcome = guard_kit.tried(harmless)
    assert not outcome.red and outcome.says == "passes", outcome
