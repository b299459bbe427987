"""Parts that come with the data: a column that says them, tables and folders with their names."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from kit.pictures import picture
from kit.sources import captions, reasons
from kit.towers import image_tower
from threetowers.data.open import open_source, splits
from threetowers.data.source import Source
from threetowers.errors import DataError, UsageError
from threetowers.store.embed import write_store
from threetowers.store.read import FIXED, find_store

NAMES = ("train", "val", "test", "train")
SPELLED = [
    ("train", "val", "test", "restval"),
    ("training", "validation", "testing", "train"),
    ("Train", "VALID", "Test", " train "),
    ("TRAIN", "Dev", "TEST", "RESTVAL"),
]


def pictures(folder: Path, num: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (folder / f"{number}.png").write_bytes(picture(number))


def rows(names: Sequence[str], num: int = 40) -> list[dict[str, str]]:
    return [
        {"image": f"{n}.png", "caption": f"thing {n}", "split": names[n % len(names)]} for n in range(num)
    ]


def write(path: Path, entries: Sequence[dict[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, entries)))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(entries)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    return str(path)


def numbers(source: Source) -> list[int]:
    """The numbers in the captions of a source."""
    return [int(source.record(i).captions[0].split()[1]) for i in range(len(source))]


def assert_parts(path: str, num: int = 40) -> tuple[Source, Source, Source]:
    """The rows are in the parts of NAMES, and the whole has them all."""
    parts = splits(path)
    found = [sorted(numbers(part)) for part in parts]
    expected = [[n for n in range(num) if NAMES[n % 4] == name] for name in ("train", "val", "test")]
    assert found == expected
    assert sorted(numbers(open_source(path))) == list(range(num))
    copies = pickle.loads(pickle.dumps(parts))
    assert [copy.fingerprint for copy in copies] == [part.fingerprint for part in parts]
    assert [copy.image(0) for copy in copies] == [part.image(0) for part in parts]
    return parts


@pytest.mark.parametrize("names", SPELLED, ids=["karpathy", "long", "spaced", "upper"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_split_column_of_a_table_is_kept(name: str, names: Sequence[str], tmp_path: Path) -> None:
    pictures(tmp_path)
    path = write(tmp_path / name, rows(names))
    train, _, test = assert_parts(path)
    assert "its column `split` says each row's part" in train.layout
    assert (train.name, test.name) == ("t/train", "t/test")


def test_a_split_column_changes_no_id_and_no_fingerprint_of_the_whole(tmp_path: Path) -> None:
    pictures(tmp_path)
    whole = open_source(write(tmp_path / "t.csv", rows(("train", "test"))))
    plain = open_source(
        write(tmp_path / "t.csv", [{k: row[k] for k in ("image", "caption")} for row in rows(("",))])
    )
    assert whole.fingerprint == plain.fingerprint


def test_a_split_column_without_all_parts_gets_them_from_training(tmp_path: Path) -> None:
    pictures(tmp_path)
    train, val, test = splits(write(tmp_path / "t.csv", rows(("train", "test"))), val_fraction=0.3)
    assert numbers(test) == list(range(1, 40, 2))
    assert len(val) > 0 and len(train) + len(val) == 20
    train, val, test = splits(
        write(tmp_path / "t.csv", rows(("train",))), val_fraction=0.3, test_fraction=0.3
    )
    assert val and test and sum(map(len, (train, val, test))) == 40
    path = write(tmp_path / "t.csv", rows(("test",)))
    with pytest.raises(DataError, match=r"parts test, but none to train on.*--inputs\.split-column none"):
        splits(path)
    assert sum(map(len, splits(path, split_column=None))) == 40


def test_a_split_column_can_have_another_name_or_be_left_out_of_account(tmp_path: Path) -> None:
    pictures(tmp_path)
    entries = [{**row, "fold": NAMES[(n + 1) % 4]} for n, row in enumerate(rows(NAMES))]
    path = write(tmp_path / "t.csv", entries)
    assert numbers(splits(path, split_column="fold")[2]) == list(range(1, 40, 4))
    parts = splits(path, split_column=None, val_fraction=0.3)
    assert len(parts[1]) != 10
    with pytest.raises(UsageError, match=r"no column `flod`; did you mean `fold`\?"):
        splits(path, split_column="flod")
    (tmp_path / "mix.toml").write_text('[[source]]\npath = "t.csv"\nsplit_column = "fold"\n')
    assert numbers(splits(str(tmp_path / "mix.toml"))[2]) == list(range(1, 40, 4))
    (tmp_path / "mix.toml").write_text('[[source]]\npath = "t.csv"\nsplit_column = "none"\n')
    assert len(splits(str(tmp_path / "mix.toml"), val_fraction=0.3)[1]) == len(parts[1])


@pytest.mark.parametrize("value", ["fold1", "", "0", "trian"])
def test_a_value_that_is_no_part_is_named(value: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    path = write(tmp_path / "t.csv", [*rows(NAMES), {"image": "0.png", "caption": "x", "split": value}])
    with pytest.raises(
        DataError, match=rf"1 rows have a `split` that is none of train.*'{value}'.*split-column none"
    ):
        splits(path)
    assert len(open_source(path)) == 40


def test_an_image_of_two_parts_is_kept_out_of_training_and_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    more = [{"image": f"{n}.png", "caption": f"again {n}", "split": "train"} for n in (1, 2)]
    more.append({"image": "0.png", "caption": "again 0", "split": "test"})
    train, val, test = splits(write(tmp_path / "t.csv", [*rows(NAMES), *more]))
    assert {"0.png", "2.png"} <= captions(test).keys() and "1.png" in captions(val)
    assert not captions(train).keys() & {"0.png", "1.png", "2.png"}
    assert sum((reasons(part) for part in (train, val, test)), start=reasons(train)) - reasons(train) == {
        "two parts": 3
    }


def test_problems_are_those_of_their_part(tmp_path: Path) -> None:
    pictures(tmp_path, 38)
    parts = splits(write(tmp_path / "t.csv", rows(NAMES)))
    assert [[problem.id for problem in part.problems] for part in parts] == [["39.png"], [], ["38.png"]]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("parted", [False, True])
def test_a_split_column_of_a_saved_dataset_is_kept(parted: bool, labels: bool, tmp_path: Path) -> None:
    """As flickr30k is published: one part, whose column says which rows are for training."""
    split = ClassLabel(names=["test", "val", "train"]) if labels else Value("string")
    features = Features({"image": datasets.Image(), "caption": Value("string"), "split": split})
    images = [{"bytes": picture(n + 100), "path": None} for n in range(40)]
    cells: dict[str, list[Any]] = {
        "image": images,
        "caption": [f"thing {n}" for n in range(40)],
        "split": [NAMES[n % 4] for n in range(40)],
    }
    if labels:
        cells["split"] = [split.str2int(name) for name in cells["split"]]
    saved = Dataset.from_dict(cells, features=features)
    (DatasetDict({"test": saved}) if parted else saved).save_to_disk(tmp_path / "saved")
    assert_parts(f"hfds:{tmp_path / 'saved'}")
    bad = Dataset.from_dict(
        {**cells, "split": ["fold"] * 40}, features=Features({**features, "split": Value("string")})
    )
    bad.save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"40 rows have a `split`.*'fold'"):
        splits(str(tmp_path / "bad"))
    assert sum(map(len, splits(str(tmp_path / "bad"), split_column=None))) == 40


@pytest.mark.parametrize("kind", ["coco", "karpathy"])
def test_a_split_in_annotations_is_kept_or_left_out_of_account(kind: str, tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    images: list[dict[str, Any]] = [{"id": n, "split": NAMES[n % 4]} for n in range(40)]
    for n, entry in enumerate(images):
        sentences = {"filename": f"{n}.png", "sentences": [{"raw": f"thing {n}"}]}
        entry |= sentences if kind == "karpathy" else {"file_name": f"{n}.png"}
    captions = [{"image_id": n, "caption": f"thing {n}"} for n in range(40)]
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    assert_parts(str(path))
    images[0]["split"] = "fold1"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    with pytest.raises(DataError, match=r"1 images have a `split` .*0.png: 'fold1'.*split-column none"):
        splits(str(path))
    assert sum(map(len, splits(str(path), split_column=None))) == 40 == len(open_source(str(path)))


def test_images_that_a_folders_table_leaves_out_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path)
    path = Path(write(tmp_path / "metadata.csv", rows(NAMES)[:30]))
    assert "10 images of the folder are in no row, for example 30.png" in open_source(str(tmp_path)).layout
    assert "in no row" not in open_source(str(path)).layout


# --- tables whose names are parts, and folders


def by_part() -> dict[str, list[dict[str, str]]]:
    entries = [{"image": f"{n}.png", "caption": f"thing {n}"} for n in range(40)]
    return {
        part: [row for n, row in enumerate(entries) if NAMES[n % 4] == part]
        for part in ("train", "val", "test")
    }


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "val.csv", "test.csv"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("captions_train2017.jsonl", "captions_val2017.jsonl", "captions_test2017.jsonl"),
        ("data/train.parquet", "data/dev.parquet", "data/test.parquet"),
    ],
)
def test_tables_with_the_names_of_parts_are_those(names: Sequence[str], tmp_path: Path) -> None:
    pictures(tmp_path / Path(names[0]).parent)
    for name, entries in zip(names, by_part().values(), strict=True):
        write(tmp_path / name, entries)
    assert_parts(str(tmp_path))


def test_tables_beside_a_folder_of_images_for_each(tmp_path: Path) -> None:
    for part, entries in by_part().items():
        pictures(tmp_path / part)
        write(tmp_path / f"{part}.csv", entries)
    parts = assert_parts(str(tmp_path))
    assert parts[1].record(0).id == "val/1.png"


def test_pieces_of_a_table_are_one(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number, start in enumerate((0, 20)):
        write(tmp_path / f"part-{number:05d}.csv", rows(NAMES)[start : start + 20])
    assert_parts(str(tmp_path))


def test_tables_in_a_folder_beside_the_images_are_named(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    for part, entries in by_part().items():
        write(tmp_path / "annotations" / f"{part}.csv", entries)
    with pytest.raises(
        DataError, match=r"holds annotations/test.csv, annotations/train.csv.*open one of them"
    ):
        open_source(str(tmp_path))
    assert_parts(str(tmp_path / "annotations"))


def test_tables_beside_those_of_the_parts_are_said(tmp_path: Path) -> None:
    pictures(tmp_path)
    for part, entries in by_part().items():
        write(tmp_path / f"{part}.csv", entries)
    write(tmp_path / "labels.csv", [{"id": "1", "name": "x"}])
    assert assert_parts(str(tmp_path))[0].layout.endswith("not read: labels.csv")
    write(tmp_path / "boxes_train.csv", [{"id": "1", "box": "x"}])
    with pytest.raises(DataError, match=r"holds boxes_train.csv, labels.csv.*open one of them"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["captions.csv", "anything.jsonl", "metadata.csv", "train.parquet"])
def test_the_only_table_in_a_folder_is_the_folders(name: str, tmp_path: Path) -> None:
    for sub in ("a", "b"):
        pictures(tmp_path / sub, 2)
    entries = [{"image": f"{sub}/{n}.png", "caption": f"{sub} {n}"} for sub in "ab" for n in range(2)]
    write(tmp_path / name, entries)
    assert len(open_source(str(tmp_path))) == 4
    assert sum(map(len, splits(str(tmp_path)))) == 4


def test_a_table_for_the_images_in_train_and_test(tmp_path: Path) -> None:
    entries = []
    for sub in ("train", "test"):
        pictures(tmp_path / sub, 3)
        entries += [{"image": f"{sub}/{n}.png", "caption": f"{sub} {n}", "split": sub} for n in range(3)]
    write(tmp_path / "captions.csv", entries)
    assert len(open_source(str(tmp_path))) == 6
    assert captions(splits(str(tmp_path))[2]).keys() == {f"test/{n}.png" for n in range(3)}


def test_texts_beside_the_images_come_before_a_table(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 3)
    for number in range(3):
        (tmp_path / "a" / f"{number}.txt").write_text("from the text")
    write(tmp_path / "0.csv", [{"key": "0", "url": "https://example.org/0.png"}])
    assert set(captions(open_source(str(tmp_path))).values()) == {("from the text",)}


def tables(folder: Path, name: str) -> str:
    for part, entries in by_part().items():
        pictures(folder / part)
        write(folder / part / name, entries)
    return str(folder)


def texts(folder: Path) -> str:
    for part, entries in by_part().items():
        pictures(folder / part, 0)
        for row in entries:
            (folder / part / row["image"]).write_bytes(picture(1))
            (folder / part / row["image"]).with_suffix(".txt").write_text(row["caption"])
    return str(folder)


def saved_parts(folder: Path) -> str:
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    parts = {}
    for part, entries in by_part().items():
        images = [
            {"bytes": picture(int(row["image"].partition(".")[0]) + 300), "path": None} for row in entries
        ]
        cells: dict[str, list[Any]] = {"image": images, "caption": [row["caption"] for row in entries]}
        parts["validation" if part == "val" else part] = Dataset.from_dict(cells, features=features)
    DatasetDict(parts).save_to_disk(folder / "saved")
    return str(folder / "saved")


FOLDERS: dict[str, Callable[[Path], str]] = {
    "metadata": lambda folder: tables(folder, "metadata.csv"),
    "captions": lambda folder: tables(folder, "captions.csv"),
    "jsonl": lambda folder: tables(folder, "whatever.jsonl"),
    "texts": texts,
    "saved": saved_parts,
}


@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS)
def test_the_whole_of_split_folders_is_all_parts(make: Callable[[Path], str], tmp_path: Path) -> None:
    path = make(tmp_path)
    train, _, test = assert_parts(path)
    whole = open_source(path)
    ids = {whole.record(i).id for i in range(len(whole))}
    assert len(ids) == 40 and f"test/{test.record(0).id}" in ids
    assert whole.image(len(whole) - 1) == test.image(len(test) - 1)
    assert "parts train" in whole.layout and "parts train" not in train.layout
    with pytest.raises(IndexError):
        whole.record(40)


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "validation"):
        pictures(tmp_path / part, 2)
    with pytest.raises(DataError, match="val and validation are both its part val"):
        splits(str(tmp_path))


def test_a_store_of_the_whole_serves_the_parts_of_split_folders(timm_tower: str, tmp_path: Path) -> None:
    """`embed` takes the folder that `train` takes, also where a part is split off another."""
    path = tables(tmp_path / "data", "captions.csv")
    shutil.rmtree(tmp_path / "data" / "val")
    tower, device = image_tower(timm_tower), torch.device("cpu")
    stored = write_store(tower, open_source(path), tmp_path / "store", device)
    assert stored is not None
    fingerprints = tower.fingerprints()
    train, val, test = splits(path, val_fraction=0.3)
    for part in (train, val, test):
        store, differing = find_store(tmp_path / "store", fingerprints, part, FIXED)
        assert store is not None and not differing
        assert len(store) == len(part)
    own = write_store(tower, test, tmp_path / "own", device)
    assert own is not None
    ends = np.array([0, len(test) - 1])
    found, _ = find_store(tmp_path / "store", fingerprints, test, FIXED)
    assert found is not None and torch.equal(found.rows(ends), own.rows(ends))
    assert find_store(tmp_path / "own", fingerprints, test, FIXED)[0] is not None
