"""The texts in a table's cell or in a value of JSON, which may hold a list or an object instead of one text."""

import ast
import json
import re
from typing import Any

TEXT_KEYS = (
    "caption",
    "captions",
    "raw",
    "text",
    "texts",
    "txt",
    "sentence",
    "sentences",
    "description",
    "title",
)
"""Keys that an object has its text under, the most usual first."""

CAPTION_KEYS = (
    "captions",
    "caption",
    "text",
    "TEXT",
    "sentence",
    "description",
    "title",
    "alt",
    "alt_text",
    "prompt",
)
"""Keys of a sample's json that can hold its captions, the first that does counts."""

_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_OPENINGS = {
    *_BRACKETS,
    *" \t\r\n",
    "a",
}  # first characters of what may be a list; an array begins with its name
_QUOTED = r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\")"""
_ITEM = re.compile(rf"({_QUOTED}|None|nan|null|\.\.\.)|[\s,\[\]()]+|array\(|dtype=[\w<>|']+", re.DOTALL)
_LANGUAGE = re.compile(r"(?!(?:alt|img|key|md5|sha|src|tag|url)\b)[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_MAX_DEPTH = 8  # lists in lists; nothing that people write is deeper


def cell_texts(cell: Any) -> list[str]:
    """The texts in a cell: one text, a list, an object, or either of them written as text.

        ["a", "b"]    {"raw": "a"}    {"en": "a", "de": "b"}    ['a', "it's b"]    ['a' 'b']

    The last two are what pandas and numpy write into a CSV. Nothing is evaluated. A text that only looks like a list
    is a text. Of an object the texts are those under its usual key, or those of all its languages.
    """
    if isinstance(cell, str):
        if cell[:1] not in _OPENINGS:
            return _bytes_texts(cell) if cell[:2] in ("b'", 'b"') else [cell]
        written = _read_written(cell.strip())
        return [cell] if written is None else written
    return _texts(cell, 0)


def json_texts(text: str) -> list[str]:
    """The captions in the json of one image: under the first of CAPTION_KEYS that has any, or the whole of it."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(document, dict):
        items = document if isinstance(document, list) else [document]
        return cell_texts(items) if all(isinstance(item, str | dict) for item in items) else []
    return next((texts for key in CAPTION_KEYS if (texts := cell_texts(document.get(key)))), [])


def _texts(value: Any, depth: int) -> list[str]:
    """The texts in a value that is no written list, in a list and in an object."""
    if isinstance(value, str):
        return [value] if depth else cell_texts(value)
    if value is None or depth > _MAX_DEPTH:
        return []
    if isinstance(value, list | tuple | set):
        return [text for item in value for text in _texts(item, depth + 1)]
    if isinstance(value, dict):
        return _object_texts(value, depth)
    if isinstance(value, bytes):
        try:
            return [value.decode()]
        except UnicodeError:
            return []
    return [] if isinstance(value, bool) else [str(value)]


def _bytes_texts(cell: str) -> list[str]:
    """The text in bytes that Python has written, such as `b'a dog'`; any other cell is a text itself."""
    value = _literal(cell.strip())
    return (_texts(value, 1) if isinstance(value, bytes) else []) or [cell]


def file_texts(text: str) -> list[str]:
    """The captions in a file's text: those of a list or an object that is the whole file, else one a line."""
    whole = text.strip()
    return (_read_written(whole) if whole[:1] in ("[", "{") else None) or text.split("\n")


def _object_texts(value: dict[Any, Any], depth: int) -> list[str]:
    """The texts under the object's usual key; else those of a map of languages, such as {"en": "a", "de": "b"}."""
    keys = {str(key).lower(): key for key in value}
    for key in TEXT_KEYS:
        if key in keys and (texts := _texts(value[keys[key]], depth + 1)):
            return texts
    languages = set(keys) != {"id"} and (
        all(map(_LANGUAGE.fullmatch, keys))
        or all(map(str.isdigit, keys))  # pandas numbers the items of a list
    )
    return _texts(list(value.values()), depth) if languages else []


def _read_written(text: str) -> list[str] | None:
    """The texts of a list or object that is written as text; None when the text is none.

    A list of numbers is no list of captions.
    """
    text = text.removeprefix("array")
    if not text or text[-1] != _BRACKETS.get(text[0]):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        quoted = _quoted_items(text[1:-1])
        if quoted is not None or text[0] == "(":
            return quoted
        value = _literal(text)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        return None
    items = [item for item in items if item is not None]
    if items and not any(isinstance(item, str | dict | list) for item in items):
        return None
    texts = _texts(items, 1)
    return texts if texts or not items or isinstance(items[0], dict) else None


def _quoted_items(inner: str) -> list[str] | None:
    """The texts of a list whose items are quoted as Python quotes them; None when anything else is between.

    Items may stand beside each other without a comma, as numpy writes them. Python itself would join those.
    """
    texts: list[str] = []
    position, num_items = 0, 0
    while position < len(inner):
        item = _ITEM.match(inner, position)
        if item is None:
            return None
        position, num_items = item.end(), num_items + (item[1] is not None)
        if item[1] and item[1][-1] in "'\"":
            try:
                value = ast.literal_eval(item[1].replace("\n", "\\n").replace("\r", "\\r"))
                texts.append(value.decode() if isinstance(value, bytes) else value)
            except (ValueError, SyntaxError):
                return None
    return texts if num_items else None


def _literal(text: str) -> Any:
    """A Python literal; None when the text is none, or is too deep to be read."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
