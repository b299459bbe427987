"""Cells that hold a list or an object of captions, however a program has written it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kit.sources import captions
from threetowers.data.cells import cell_texts
from threetowers.data.open import open_source

WRITTEN = [
    ("""['a', "it's b"]""", ["a", "it's b"]),  # pandas
    ("['a' 'b']", ["a", "b"]),  # numpy
    ("['a'\n 'it\\'s b'\n \"c's\"]", ["a", "it's b", "c's"]),  # numpy over several lines
    ("array(['a', 'b'], dtype=object)", ["a", "b"]),
    ("[array(['a'], dtype=object) array(['b'], dtype='<U1')]", ["a", "b"]),
    ("('a', 'b')", ["a", "b"]),
    ("{'a', 'b'}", ["a", "b"]),
    ("['a', nan, None]", ["a"]),
    ("[]", []),
    ("[None]", []),
    ('[ "a" , "b" ]', ["a", "b"]),
    ('  [\n  "a",\n  "b"\n]\n', ["a", "b"]),
    ('["a", 3]', ["a", "3"]),
    ('[["a"], ["b"]]', ["a", "b"]),
    ('{"en": "a", "de": "b"}', ["a", "b"]),
    ('{"en": ["a", "b"], "pt-BR": null}', ["a", "b"]),
    ("{'en': 'a', 'de': None}", ["a"]),
    ('{"raw": "a", "tokens": ["x"], "sentid": 3}', ["a"]),
    ('[{"raw": "a"}, {"caption": "b"}, {"text": "c"}]', ["a", "b", "c"]),
    ("[{'image_id': 3, 'caption': 'a'}]", ["a"]),
    ('{"url": "x", "width": 3}', []),
]
ONLY_TEXT = [
    "[untitled]", "[1, 2]", "[A] cat [B]", "['oops] said he", '["a"] and ["b"]', "['a'] and ['b']", "(a photo)",
    "{smile}", '"quoted"', "array of cats", "an array(['a'])", "[", "[]]", "['a', __import__('os')]",
    "['a', 'b'].pop()", "(1)", "a, b", "12", "[" * 5000 + "]" * 4999,
]  # fmt: skip


@pytest.mark.parametrize(("cell", "texts"), WRITTEN, ids=[cell for cell, _ in WRITTEN])
def test_lists_and_objects_written_as_text_are_read(cell: str, texts: list[str]) -> None:
    assert sorted(cell_texts(cell)) == sorted(texts)


@pytest.mark.parametrize("cell", ONLY_TEXT, ids=[cell[:30] for cell in ONLY_TEXT])
def test_a_caption_that_only_looks_like_a_list_stays_text(cell: str) -> None:
    assert cell_texts(cell) == [cell]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"en": "a", "de": "b"}, ["a", "b"]),
        ({"caption": ["a", "b"], "id": 3}, ["a", "b"]),
        ([{"language": "en", "text": "a"}, {"sentence": "b"}, "c", None], ["a", "b", "c"]),
        ({"raw": ["a", "b"], "tokens": [["x"], ["y"]]}, ["a", "b"]),
        ({"captions": {"en": "a"}}, ["a"]),
        ([["a", ["b"]]], ["a", "b"]),
        (["[untitled]", "['a']"], ["[untitled]", "['a']"]),
        (3, ["3"]),
        (None, []),
        (True, []),
        (b"\xff\xd8", []),
    ],
)
def test_values_of_json_and_parquet(value: Any, texts: list[str]) -> None:
    assert cell_texts(value) == texts


@pytest.mark.parametrize("depth", [20, 900, 100_000])
def test_lists_too_deep_are_no_captions(depth: int) -> None:
    cell: Any = "[" * depth + "]" * depth
    assert cell_texts(cell) in ([], [cell])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
@pytest.mark.parametrize(
    "cell", ["['a', \"it's b\"]", "['a'\n \"it's b\"]", '[{"raw": "a"}, {"raw": "it\'s b"}]']
)
def test_lists_in_the_cells_of_a_table(name: str, cell: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with (tmp_path / name).open("w", newline="") as file:
        if name == "t.csv":
            csv.writer(file).writerows([["image", "caption"], ["a.png", cell]])
        else:
            file.write(json.dumps({"image": "a.png", "caption": cell}))
    assert captions(open_source(str(tmp_path / name))) == {"a.png": ("a", "it's b")}


def test_lists_in_annotations(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    document = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 1, "caption": "['a', 'b']"},
            {"image_id": 1, "caption": {"en": "c"}},
            {"image_id": 1, "caption": ["d"]},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(document))
    assert captions(open_source(str(tmp_path / "c.json"))) == {"a.png": ("a", "b", "c", "d")}
