"""Data as they are downloaded and exported: folders, parts, cells and shards in further forms that people have."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kit.pictures import picture
from threetowers.data.open import open_source, splits
from threetowers.errors import DataError


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pictures(folder: Path, num: int = 24, first: int = 0) -> None:
    for number in range(num):
        put(folder / f"{number}.png", picture(first + number))


def table(path: Path, columns: Mapping[str, Callable[[int], Any]], num: int = 24) -> str:
    """A table in JSONL with a column for each function of the row's number."""
    put(path, "".join(json.dumps({name: f(n) for name, f in columns.items()}) + "\n" for n in range(num)))
    return str(path)


def shard(path: Path, members: Mapping[str, bytes | str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def image(number: int) -> str:
    return f"{number}.png"


def caption(number: int) -> str:
    return f"thing number {number}"


@pytest.mark.parametrize(
    "place", ["annotations/captions_train2017.json", "dataset_coco.json", "captions.txt"]
)
def test_folders_of_parts_beside_a_file_of_captions_are_no_classes(tmp_path: Path, place: str) -> None:
    for part in ("train2017", "val2017"):
        pictures(tmp_path / part, 3)
    put(tmp_path / place, "{}")
    with pytest.raises(DataError, match=f"for example .*{place}"):
        open_source(str(tmp_path))


def test_folders_of_classes_stay_classes_beside_other_json(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / name, 3)
    put(tmp_path / "class_index.json", "{}")
    assert open_source(str(tmp_path)).class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    "column", ["subset", "partition", "Set", "data_split", "dataset-split", "fold", "phase"]
)
def test_the_column_of_parts_has_other_usual_names(tmp_path: Path, column: str) -> None:
    pictures(tmp_path)
    path = table(
        tmp_path / "t.jsonl",
        {"image": image, "caption": caption, column: lambda n: ("train", "valid", "test")[n % 3]},
    )
    assert list(map(len, splits(path))) == [8, 8, 8]
    assert f"`{column}` says each row's part" in open_source(path).layout
    assert list(map(len, splits(path, split_column=None))) != [8, 8, 8]


@pytest.mark.parametrize("values", [("train", "bus", "car"), (0, 1, 2), ("a", "b", "c")])
def test_a_column_with_a_name_of_parts_and_other_values_is_none(
    tmp_path: Path, values: tuple[Any, ...]
) -> None:
    pictures(tmp_path)
    path = table(tmp_path / "t.jsonl", {"image": image, "caption": caption, "set": lambda n: values[n % 3]})
    assert sum(map(len, splits(path))) == 24 and "each row's part" not in open_source(path).layout


@pytest.mark.parametrize("folder", ["Bilder", "my photos", "set/pics"])
def test_a_table_beside_a_folder_of_any_name_that_holds_its_images(tmp_path: Path, folder: str) -> None:
    pictures(tmp_path / folder)
    path = table(tmp_path / "captions.jsonl", {"image": image, "caption": caption})
    for place in (path, str(tmp_path)):
        source = open_source(place)
        assert len(source) == 24 and not source.problems


def test_names_that_two_folders_below_have_are_not_guessed(tmp_path: Path) -> None:
    for number, folder in enumerate(("cats", "dogs")):
        pictures(tmp_path / folder, first=100 * number)
    path = table(tmp_path / "captions.jsonl", {"image": image, "caption": caption})
    with pytest.raises(DataError, match="missing file: 24"):
        open_source(path)
