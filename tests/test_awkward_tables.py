"""Tables as spreadsheets and scripts write them, with rows that are damaged and paths of every kind."""

import contextlib
import csv
import json
import os
from pathlib import Path

import pytest

from kit.sources import captions, reasons
from threetowers.data.formats import rows as rows_module
from threetowers.data.open import open_source
from threetowers.errors import DataError

NUM = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(NUM):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    return tmp_path


def table(folder: Path, lines: list[str], name: str = "t.csv", **how: str) -> str:
    (folder / name).write_text("\n".join(lines) + "\n", **({"encoding": "utf-8", "newline": ""} | how))  # type: ignore[arg-type]
    return str(folder / name)


def rows(start: int = 0, *, quoted: bool = False) -> list[str]:
    mark = '"' if quoted else ""
    return [f"{n}.png,{mark}thing {n}{mark}" for n in range(start, NUM)]


def numbers(path: str) -> set[int]:
    return {int(id.partition(".")[0]) for id in captions(open_source(path))}


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        '3.png,"never closed',
        '3.png,"a photo of 5" paper"',
        '3.png,"one" and "two"',
        '"3.png,a photo',
        '3.png,"two, of them',
    ],
)
@pytest.mark.parametrize("place", [3, NUM - 1])
def test_quotes_that_do_not_pair_up_cost_one_row(bad: str, place: int, quoted: bool, folder: Path) -> None:
    lines = ["image,caption", *rows(quoted=quoted)]
    lines[1 + place] = bad
    path = table(folder, lines)
    source = open_source(path)
    assert [problem.reason for problem in source.problems] == ["damaged row"]
    assert str(source.problems[0]).startswith(f"t.csv:{place + 2}: damaged row (the quotes do not pair up")
    assert numbers(path) == set(range(NUM)) - {place}


def test_a_quote_that_pairs_up_many_rows_later_swallows_none(folder: Path) -> None:
    lines = ["image,caption", *rows()]
    lines[4], lines[20] = '3.png,"never closed', '19.png,5"'
    path = table(folder, lines)
    source = open_source(path)
    assert numbers(path) == set(range(NUM)) - {3}
    assert [problem.id for problem in source.problems] == ["t.csv:5"]
    assert captions(source)["19.png"] == ('5"',)


def test_a_caption_over_several_lines_is_one(folder: Path) -> None:
    path = table(folder, ["image,caption", '0.png,"one, two', "three, four", 'five"', *rows(1)])
    source = open_source(path)
    assert captions(source)["0.png"] == ("one, two three, four five",)
    assert len(source) == NUM and not source.problems


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_a_field_of_any_length_is_read(name: str, folder: Path) -> None:
    long = "word " * 60_000
    lines = ["image,caption", f'0.png,"{long}"', *rows(1)]
    if name == "t.tsv":
        lines = [line.replace(",", "\t") for line in lines]
    if name == "t.jsonl":
        lines = [
            json.dumps({"image": f"{n}.png", "caption": f"thing {n}" if n else long}) for n in range(NUM)
        ]
    source = open_source(table(folder, lines, name))
    assert len(source) == NUM and not source.problems
    assert captions(source)["0.png"][0].startswith("word word")


def test_a_field_beyond_all_bounds_costs_one_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_FIELD", 1000)
    source = open_source(table(folder, ["image,caption", f'0.png,"{"x" * 2000}"', *rows(1)]))
    assert len(source) == NUM - 1 and str(source.problems[0]).startswith("t.csv:2: damaged row")


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ('image;"caption, in English, as written, by hand"', '{n}.png;"thing {n}, and more"'),
        ("image;caption (one, two, three)", "{n}.png;thing {n}"),
        ('"image";"caption"', '"{n}.png";"a, b; c, thing {n}"'),
        ("image|caption, in English; with care; really", "{n}.png|thing {n}"),
        ("image\tcaption, text, words", "{n}.png\tthing, {n}"),
        ("sep=;\nimage;caption,x,y", "{n}.png;thing {n}"),
        ('"sep=;"\r\nimage;caption,x,y', "{n}.png;thing {n}"),
        ("\n\nimage;caption", "{n}.png;thing {n}"),
        ('image;"caption\n(in English, or not)"', "{n}.png;thing {n}"),
        ("sep=,\nimage,caption", "{n}.png,thing {n}"),
        ("SEP=\t\r\nimage\tcaption", "{n}.png\tthing {n}"),
        ("image,caption,,", "{n}.png,thing {n},,"),
        ("image,caption,,", "{n}.png,thing {n}"),
        ("image,caption", "{n}.png,thing {n},,"),
    ],
)
def test_the_delimiter_is_the_one_that_divides_the_rows(header: str, row: str, folder: Path) -> None:
    path = table(folder, [header, *(row.replace("{n}", str(n)) for n in range(NUM))])
    source = open_source(path)
    assert numbers(path) == set(range(NUM)) and not source.problems
    assert "thing" in source.record(0).captions[0] or "a, b; c" in source.record(0).captions[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_encodings_and_line_ends(name: str, end: str, encoding: str, folder: Path) -> None:
    delimiter = "\t" if name == "t.tsv" else ","
    text = end.join(["image,caption", *(f"{n}.png,größe {n}" for n in range(NUM))]).replace(",", delimiter)
    (folder / name).write_bytes(text.encode(encoding))
    found = captions(open_source(str(folder / name)))
    assert found == {f"{n}.png": (f"größe {n}",) for n in range(NUM)}


def test_quotes_of_the_header_that_do_not_pair_up_are_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"t.csv:1: the quotes in its header do not pair up"):
        open_source(table(folder, ['image,"caption', *rows()]))


def test_nul_bytes_are_no_end_of_the_table(folder: Path) -> None:
    path = table(folder, ["image,caption", "0.png,a\0b", *rows(1)])
    assert numbers(path) == set(range(NUM))


def test_columns_of_one_name_are_all_read(folder: Path) -> None:
    source = open_source(table(folder, ["image,caption,caption,caption,caption.1", "0.png,a,b,c,d"]))
    assert captions(source) == {"0.png": ("a", "b", "c", "d")}


def test_trailing_cells_that_are_not_empty_are_a_wrong_row(folder: Path) -> None:
    source = open_source(table(folder, ["image,caption", "0.png,a,b", "1.png", *rows(2)]))
    assert reasons(source) == {"wrong number of fields": 2}


# --- paths


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_paths_relative_to_a_folder_above_the_table_are_found(depth: int, folder: Path) -> None:
    deep = folder.joinpath(*"abcd"[:depth])
    deep.mkdir(parents=True)
    assert len(open_source(table(deep, ["image,caption", *rows()]))) == NUM


def test_paths_relative_to_the_working_folder_are_found(folder: Path) -> None:
    (folder / "work" / "images").mkdir(parents=True)
    (folder / "else").mkdir()
    for number in range(NUM):
        (folder / f"{number}.png").rename(folder / "work" / "images" / f"{number}.png")
    lines = ["image,caption", *(f"images/{row}" for row in rows())]
    with contextlib.chdir(folder / "work"):
        source = open_source(table(folder / "else", lines))
    assert len(source) == NUM and source.image(0) == b"x"


def test_a_file_address_and_a_home_are_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a b ü.png").write_bytes(b"x")
    cells = [
        f"file://{folder}/0.png", f"file://localhost{folder}/1.png", f"file:{folder}/2.png", "~/3.png",
        f"FILE://{folder}/a%20b%20%C3%BC.png",
    ]  # fmt: skip
    source = open_source(table(folder, ["image,caption", *(f"{cell},thing" for cell in cells)]))
    assert len(source) == 5 and not source.problems
    assert source.image(0) == b"x" and source.record(4).id.endswith("a b ü.png")


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "HTTPS"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_addresses_are_refused_in_one_line(name: str, scheme: str, folder: Path) -> None:
    cells = [f"{scheme}://example.org/{n}.png" for n in range(2000)]
    path = folder / name
    if name == "t.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["url", "caption"], *([cell, "x"] for cell in cells)])
    else:
        path.write_text("\n".join(json.dumps({"image": cell, "caption": "x"}) for cell in cells))
    with pytest.raises(DataError) as raised:
        open_source(str(path))
    message = str(raised.value)
    assert "2000 addresses, for example " + cells[0] in message and "img2dataset" in message
    assert len(message) < 120 * 6 and "\n" not in message


def test_some_addresses_among_files_are_named(folder: Path) -> None:
    source = open_source(table(folder, ["image,caption", "https://example.org/a.png,x", *rows()]))
    assert len(source) == NUM
    assert "t.csv:2: an address" in str(source.problems[0]) and os.sep in source.folder  # type: ignore[attr-defined]
