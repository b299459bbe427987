"""Commands, flags and model names in the documents exist. Commands are read as the command line does, and not run."""

import functools
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm

from threetowers import cli
from threetowers.commands import arguments
from threetowers.commands import words as words_module
from threetowers.config import RunConfig
from threetowers.explore import start as explore_start
from threetowers.objective.pairs import objective
from threetowers.run.setup import check_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for place in (".", "docs", "docs/howto", "examples") for path in (ROOT / place).glob("*.md")
)
GUIDES = [*sorted((ROOT / "docs/howto").glob("*.md")), *(ROOT / "docs" / f"{name}.md" for name in
          ("tutorial", "recipes", "comparison", "settings", "evaluation", "profiling", "reliability"))]  # fmt: skip
SHELL = ("", "sh", "bash", "console")


class Parsed(Exception):  # noqa: N818 - nothing is wrong
    """Raised where a command would begin to do something; holds what it was given."""


def fenced(text: str) -> Iterator[tuple[str, int, str]]:
    """The language, the number of the first line and the text of every fenced block."""
    language, start, block = None, 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            block.append(line)
        elif language is None:
            language, start, block = line[3:].strip(), number + 1, []
        else:
            yield language, start, "\n".join(block)
            language = None


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The line and the words of every command in the shell blocks of a document; options in brackets count as given."""
    for language, start, block in fenced(text):
        if language in SHELL:
            number = start
            for line in re.sub(r"\\\n", "\\\\\0", block).splitlines():
                plain = re.sub(r"\[(--[^\]]*)\]", r"\1", line.replace("\\\0", " ")).replace("…", "")
                words = shlex.split(plain.removeprefix("until "), comments=True)
                if words:
                    yield number, words
                number += 1 + line.count("\0")


def of_program(*programs: str) -> list[Any]:
    """The words of each documented command of these programs, named after its page and line."""
    return [
        pytest.param(words[1:], id=f"{page.relative_to(ROOT)}:{number}")
        for page in PAGES
        for number, words in commands(page.read_text(encoding="utf-8"))
        if words[0] in programs
    ]


def reads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb ends with Parsed when its words are read; a TOML file is taken for the preset `tiny`."""

    def parse(kind: Callable[..., Any], words: list[str], verb: str, default: Any = None) -> Any:
        target = kind
        if inspect.isfunction(kind):
            target = functools.wraps(kind)(lambda *given, **named: named)  # reads, and does nothing
        raise Parsed(words_module.parse(target, words, verb, default))

    def run_arguments(kind: Any, words: list[str], verb: str) -> Any:
        name, *rest = words
        name, found = arguments.run_arguments(kind, ["tiny" if name.endswith(".toml") else name, *rest], verb)
        raise Parsed(found)

    monkeypatch.setattr(cli, "parse", parse)
    monkeypatch.setattr(explore_start, "parse", parse)
    monkeypatch.setattr(cli, "run_arguments", run_arguments)


@pytest.mark.parametrize("words", of_program("threetowers"))
def test_a_documented_command_is_one(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *rest = words
    assert verb in cli.VERBS
    reads_only(monkeypatch)
    with pytest.raises(Parsed) as found:
        cli.VERBS[verb](rest)
    run = getattr(found.value.args[0], "run", None)
    if isinstance(run, RunConfig):
        check_settings(run)
    if verb == "train" and isinstance(run, RunConfig):
        objective(run)


@pytest.mark.parametrize("words", of_program("make", "pip", "python"))
def test_other_programs_are_given_what_exists(words: list[str]) -> None:
    text = " ".join(words)
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    for extra in re.findall(r"threetowers\[([\w,]+)\]", text):
        assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(",")), extra
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()
    elif words[0] != "install" and not words[0].startswith("-"):
        assert f"\n{words[0]}:" in makefile


@functools.cache
def flags() -> frozenset[str]:
    """Every flag of every verb, and those of open_clip's training, which the comparison names."""
    found = set()
    kinds = [kind for name, kind in vars(arguments).items() if name.endswith("Arguments")]
    for kind in (*kinds, explore_start.ExploreArguments):
        found |= flags_of(kind)
    source = inspect.getsource(cli)
    found |= {f"--{name}".replace("_", "-") for name in re.findall(r"^        (\w+): ", source, re.MULTILINE)}
    spec = importlib.util.find_spec("open_clip_train.params")
    assert spec and spec.origin
    return frozenset(
        found | set(re.findall(r'"(--[a-z-]+)"', Path(spec.origin).read_text())) | {"--help", "--version"}
    )


def flags_of(kind: Any, prefix: str = "--") -> set[str]:
    """The flags that a dataclass and the dataclasses in it become; `run`, `options` and `config` have no prefix."""
    found = set()
    for name, field in inspect.get_annotations(kind, eval_str=True).items():
        inner = getattr(field, "__origin__", field)
        if hasattr(inner, "__dataclass_fields__"):
            bare = name in ("run", "options", "config")
            found |= flags_of(inner, prefix if bare else f"{prefix}{name}.".replace("_", "-"))
        else:
            found.add(f"{prefix}{name}".replace("_", "-"))
    for base in kind.__bases__:
        found |= flags_of(base, prefix) if hasattr(base, "__dataclass_fields__") else set()
    return found


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_flags_named_in_a_sentence_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {flag for code in re.findall(r"`([^`]+)`", text) for flag in re.findall(r"--[a-z][\w.-]*", code)}
    assert {flag.replace("_", "-") for flag in named} - flags() == set()  # tyro takes both


def test_a_flag_that_does_not_exist_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"--optim.lr", "--inputs.stored-views", "--near-copies", "--to", "--quick"} <= flags()
    assert "--optim.learning-rate" not in flags()
    reads_only(monkeypatch)
    with pytest.raises(SystemExit):
        cli.VERBS["train"](["tiny", "--optim.learning-rate", "1"])
    with pytest.raises(SystemExit):
        cli.VERBS["export"](["runs/mine", "--into", "x"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_models_named_in_a_document_are_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<!/)timm:([a-z]\w+(?:\.\w+)?)(?![\w-])", text):
        architecture, _, tag = name.partition(".")
        assert timm.is_model(architecture), name
        assert not tag or timm.list_models(name, pretrained=True), f"{name} has no published weights"
    for name, tag in re.findall(r"open_clip:(?!NAME)([\w-]+)@(?!FILE|TAG)([\w.-]+)", text):
        assert name in open_clip.list_models(), name
        assert tag.endswith(".safetensors") or tag in open_clip.list_pretrained_tags_by_model(name), tag
