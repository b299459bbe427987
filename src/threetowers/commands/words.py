"""The words of a command read into a dataclass, or into a call of a function, by tyro; and how a mistake is told.

Nothing heavy is imported here, so that --help is immediate.
"""

import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from threetowers.progress import say

T = TypeVar("T")
NONE = "none"
"""What stands for None, "not given", on the command line as in TOML."""

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`str | None`, and `Path | None`, from one word."""
    inner = [kind for kind in get_args(info.type) if kind is not type(None)]
    if get_origin(info.type) not in (Union, types.UnionType) or inner not in ([str], [Path]):
        return None
    kind = inner[0]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{'PATH' if kind is Path else 'STR'}|{NONE}",
        instance_from_str=lambda words: None if words[0] == NONE else kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [NONE if value is None else str(value)],
    )


@REGISTRY.primitive_rule
def _texts(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`tuple[str, ...]` from any number of words; `none` gives none."""
    if info.type != tuple[str, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[STR ...]|{NONE}",
        instance_from_str=lambda words: () if words == [NONE] else tuple(words),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: list(value) or [NONE],
    )


@REGISTRY.primitive_rule
def _optional_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`tuple[float, ...] | None`, and of int, from any number of words."""
    inner = [kind for kind in get_args(info.type) if kind is not type(None)]
    if get_origin(info.type) not in (Union, types.UnionType) or len(inner) != 1:
        return None
    if inner[0] not in (tuple[float, ...], tuple[int, ...]):
        return None
    number = get_args(inner[0])[0]
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{number.__name__.upper()} ...]|{NONE}",
        instance_from_str=lambda words: None if words == [NONE] else tuple(map(number, words)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [NONE] if value is None else [str(each) for each in value],
    )


def parse(kind: Callable[..., T], words: list[str], verb: str, default: T | None = None) -> T:
    """The words read into a dataclass, or into a call of a function; ends the process for --help and mistakes."""
    settings: dict[str, Any] = {} if default is None else {"default": default}
    try:
        parsed: T = tyro.cli(
            kind,
            prog=f"threetowers {verb}",
            args=words,
            registry=REGISTRY,
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
            **settings,
        )
    except SystemExit as ended:
        if ended.code:
            _hint_at_commas(words)
        raise
    return parsed


def _hint_at_commas(words: list[str]) -> None:
    """Says how several values are written where a flag that could not be read has commas in its value."""
    spaced = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(spaced):
        if flag.startswith("--") and "," in value and not Path(value).exists():
            say(f"several values are separated by spaces: {flag} {' '.join(filter(None, value.split(',')))}")


def spelled_out(words: list[str], *flags: str) -> list[str]:
    """The words with True behind each of these flags that stands alone.

    >>> spelled_out(["--yes", "--private", "False"], "--yes", "--private")
    ['--yes=True', '--private', 'False']
    """
    following = [*words[1:], ""]
    return [
        f"{word}=True" if word in flags and after not in ("True", "False") else word
        for word, after in zip(words, following, strict=True)
    ]
