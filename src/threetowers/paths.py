"""Relative paths in the TOML file of a run, which mean the same from every working directory.

The file says which folder they are relative to. The first entry is relative to the file itself, so that a project may
be moved as a whole; the second is for a run folder that is moved alone.

    directory = ["../..", "/home/me/project"]
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY = "directory"
NO_PATHS = ("none", "shapes")
_TOWER = re.compile(r"(?P<kind>(?:\w+=)?[\w-]+:)(?P<name>local-dir:|[^@]*@|)(?P<path>.+)")
_WILD = re.compile(r"[{*?\[]")


def directory(path: Path) -> dict[str, list[str]]:
    """The entry for a file at `path` whose relative paths are relative to the working directory."""
    here, folder = Path.cwd(), path.absolute().parent
    inside = [os.path.relpath(here, folder)] if folder.is_relative_to(here) else []
    return {KEY: [*inside, str(here)]}


def from_here(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of a file at `path`, with its relative paths as they have to be written in the working directory.

    values: nested, as TOML gives them. The folder is the first entry of `directory` in which one of the paths exists.
    """
    values = dict(values)
    given = values.pop(KEY, None)
    if given is None:
        return values
    entries = given if isinstance(given, list) else [given]
    bases = [Path(os.path.normpath(path.absolute().parent / str(entry))) for entry in entries]
    base = next((base for base in bases if _holds_any(values, base)), bases[-1] if bases else Path.cwd())
    return values if base == Path.cwd() else under(values, base)


def under(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """The values with `base` before every relative path."""

    def absolute(text: str) -> str:
        return os.path.normpath(base / text)

    def existing(text: str) -> str:  # it may be a name as well, of a model or a tag
        return absolute(text) if (base / text).exists() else text

    return _with_paths(values, absolute, existing)


def _holds_any(values: dict[str, Any], base: Path) -> bool:
    found: list[bool] = []

    def look(text: str) -> str:
        sure = _WILD.split(text)[0]
        found.append((base / text if sure == text else (base / f"{sure}x").parent).exists())
        return text

    _with_paths(values, look, look)
    return any(found)


def _with_paths(
    values: dict[str, Any], path: Callable[[str], str], perhaps: Callable[[str], str]
) -> dict[str, Any]:
    """The values with every relative path replaced. perhaps: for texts that can be something else too."""

    def places(text: str) -> str:
        prefix = "hfds:" if text.startswith("hfds:") else ""
        return prefix + "::".join(_relative(part, path) for part in text.removeprefix(prefix).split("::"))

    def tower(text: str) -> str:
        found = _TOWER.fullmatch(text)
        if not found:
            return text
        sure = found["kind"].endswith("file:") or found["name"] == "local-dir:"
        return found["kind"] + found["name"] + _relative(found["path"], path if sure else perhaps)

    def each(value: Any, do: Callable[[str], str]) -> Any:
        if isinstance(value, list):
            return [each(item, do) for item in value]
        return do(value) if isinstance(value, str) and value not in NO_PATHS else value

    own: dict[str, Callable[[str], str]] = {
        "data": places, "classes": places, "suite": places, "third": tower,
        "embeddings": lambda text: _relative(text, path),
    }  # fmt: skip
    changed = {key: each(value, own[key]) if key in own else value for key, value in values.items()}
    if isinstance(values.get("start"), dict):
        start = values["start"]
        changed["start"] = start | {key: each(start[key], tower) for key in ("image", "text") if key in start}
    if isinstance(values.get("pair"), dict):
        pair = values["pair"]
        changed["pair"] = pair | {
            key: each(pair[key], lambda text, do=do: _relative(text, do))  # type: ignore[misc]
            for key, do in (("weights", path), ("tokenizer", perhaps))
            if key in pair
        }
    return changed


def _relative(text: str, do: Callable[[str], str]) -> str:
    """What `do` makes of a relative path; addresses, commands and absolute paths stay as they are."""
    other = not text or "://" in text or text.startswith(("/", "~", "pipe:"))
    return text if other else do(text)
