"""Which columns of a table are the captions and the images, where names and first rows mislead."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Value

from kit.pictures import picture
from threetowers.data.formats import rows as rows_module
from threetowers.data.open import open_source
from threetowers.errors import DataError, UsageError

NUM = 6_000


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are larger than what is read to recognise their columns."""
    monkeypatch.setattr(rows_module, "_PLACE_BYTES", 1 << 11)
    monkeypatch.setattr(rows_module, "_PLACE_ROWS", 4)


def table(folder: Path, name: str, columns: dict[str, Callable[[int], Any]], num: int = NUM) -> str:
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"x")
    rows = [{name: cell(number) for name, cell in columns.items()} for number in range(num)]
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4000)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="", encoding="utf-16" if name == "utf16.csv" else "utf-8") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def image(number: int) -> str:
    return f"{number % 10}.png"


def words(number: int) -> str:
    """A caption; two rows in three have one that no other has."""
    return f"a picture of {number // 2} things, {'red' if number % 3 else 'blue'}"


def took(path: str) -> str:
    layout = open_source(path).layout
    return layout.partition("captions in ")[2]


OTHERS: dict[str, Callable[[int], str]] = {
    "addresses": lambda n: (
        f"https://example.org/a/very/long/address/of/a/picture/number/{n}/in/a/collection.html"
    ),
    "hashes": lambda n: f"{n:032x}{n * 7919:032x}",
    "paths": lambda n: f"some/long/folder/of/a/collection/that/is/not/here/{n}.tif",
    "dates": lambda n: f"2024-01-{n % 28 + 1:02d}T12:{n % 60:02d}:00.000000+00:00",
    "numbers": lambda n: f"[{n}.123456789, {n}.223456789, {n}.323456789]",
    "keys": lambda n: f"COCO_val2014_collection_of_pictures_number_{n:012d}",
    "constant": lambda n: "All rights reserved by the owners of this collection, who may be reached by mail",
    "category": lambda n: ("a long name of the first category", "a long name of the second category")[n % 2],
    "sorted": lambda n: f"a long name of the category that has number {n // 500} of all the categories",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["t.csv", "utf16.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_column_of_no_captions_is_not_taken_for_them(name: str, other: str, tmp_path: Path) -> None:
    """By content alone the longest texts are taken, but not those that are no captions or are all alike."""
    path = table(tmp_path, name, {"image": image, "info": OTHERS[other], "was": words})
    assert took(path).startswith("`was`; not taken: `info` (")


@pytest.mark.parametrize("other", ["addresses", "hashes", "paths", "numbers", "constant"])
def test_a_usual_name_with_other_content_gives_way(other: str, tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", {"image": image, "text": OTHERS[other], "was": words})
    assert took(path).startswith("`was`; not taken: `text` (")


@pytest.mark.parametrize("text", ["red_car", "1girl,solo,red_hair", ""])
def test_tags_and_an_empty_column_of_a_usual_name_give_way_to_no_unusual_one(
    text: str, tmp_path: Path
) -> None:
    columns = {
        "image": image,
        "caption": lambda n: text and f"{text}_{n}",
        "by": lambda n: f"John Smith the {n}th",
    }
    path = table(tmp_path, "t.csv", columns, 300)
    if text:
        assert took(path).startswith("`caption`; not taken: `by` (texts)")
    else:
        with pytest.raises(DataError, match=r"captions in `caption`.*empty caption: 300"):
            open_source(path)


@pytest.mark.parametrize("other", ["constant", "category", "sorted", "keys"])
def test_of_two_usual_names_the_one_with_many_texts_is_taken(other: str, tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", {"image": image, "text": OTHERS[other], "description": words})
    assert took(path).startswith("`description`; not taken: `text` (")


def test_a_column_that_is_constant_in_the_first_rows_alone_is_known_by_the_others(tmp_path: Path) -> None:
    was = {"image": image, "was": lambda n: "?" if n < 200 else words(n), "x": lambda n: f"kind {n % 2}"}
    assert took(table(tmp_path, "t.csv", was)).startswith("`was`")


@pytest.mark.parametrize("text", ["the same", "", "7"])
def test_the_only_usual_column_is_taken_whatever_it_holds(text: str, tmp_path: Path) -> None:
    path = table(
        tmp_path, "t.csv", {"image": image, "caption": lambda n: text if n else "one", "id": str}, 60
    )
    assert took(path).startswith("`caption`")


def test_two_columns_that_are_alike_are_asked_about(tmp_path: Path) -> None:
    columns = {"image": image, "first": words, "second": lambda n: f"{words(n)} again"}
    path = table(tmp_path, "t.csv", columns, 300)
    with pytest.raises(
        UsageError, match=r"in `second` or in `first`, which are alike.*--inputs.caption-columns"
    ):
        open_source(path)
    assert "not taken: `second` (texts)" in open_source(path, caption_columns=("first",)).layout


def test_two_columns_of_images_are_asked_about(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", {"front": image, "back": lambda n: image(n + 1), "caption": words}, 300)
    with pytest.raises(
        UsageError, match=r"images can be in `front` or in `back`.*--inputs.image-column front"
    ):
        open_source(path)
    assert open_source(path, image_column="back").record(0).id == "1.png"


@pytest.mark.parametrize(
    "usual",
    [lambda n: "0.png", lambda n: f"https://example.org/{n}.png", lambda n: f"IMG{n}"],
    ids=["constant", "addresses", "keys"],
)
def test_a_usual_name_of_images_with_other_content_gives_way(
    usual: Callable[[int], str], tmp_path: Path
) -> None:
    path = table(tmp_path, "t.csv", {"image": usual, "local": image, "caption": words}, 300)
    assert "images in column `local`" in open_source(path).layout


def saved(folder: Path, columns: dict[str, Sequence[str]]) -> str:
    num = len(next(iter(columns.values())))
    features = Features({"image": datasets.Image(), **{name: Value("string") for name in columns}})
    images = [{"bytes": picture(n), "path": None} for n in range(num)]
    Dataset.from_dict({"image": images, **columns}, features=features).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("other", ["addresses", "hashes", "constant", "sorted"])
def test_columns_of_a_saved_dataset(other: str, tmp_path: Path) -> None:
    rows = range(200)
    info = [OTHERS[other](n * 20) for n in rows]
    path = saved(tmp_path, {"text": info, "description": [words(n) for n in rows]})
    assert took(path).startswith("`description`; not taken: `text` (")


def test_alike_columns_of_a_saved_dataset_are_asked_about(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"first": [words(n) for n in range(40)], "second": [words(n) + "." for n in range(40)]}
    )
    with pytest.raises(UsageError, match="which are alike"):
        open_source(path)
