"""Parquet files that hold the images themselves, as dataset hubs and img2dataset write them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from kit.pictures import picture
from kit.sources import captions, content, reasons
from threetowers.data.open import open_source, splits
from threetowers.errors import DataError, UsageError

NUM = 12


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path_factory.mktemp("cache")))


def objects(path: Path, start: int = 0, stop: int = NUM, **more: Callable[[int], Any]) -> Path:
    """A column of {bytes, path} without a word about its type."""
    return plain(path, start, stop, image=lambda n: {"bytes": picture(n), "path": f"{n}.png"}, **more)


def plain(path: Path, start: int = 0, stop: int = NUM, **cells: Callable[[int], Any]) -> Path:
    cells = {"caption": lambda n: f"thing {n}"} | cells
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: cell(n) for name, cell in cells.items()} for n in range(start, stop)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    return path


def hub(path: Path, start: int = 0, stop: int = NUM) -> Path:
    """As `Dataset.to_parquet` and `push_to_hub` write it: the type Image is in the schema's metadata."""
    features = Features({"image": datasets.Image(), "caption": datasets.List(Value("string"))})
    images = [{"bytes": picture(n), "path": None} for n in range(start, stop)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": images, "caption": [[f"thing {n}", "other"] for n in range(start, stop)]}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def img2dataset(path: Path, start: int = 0, stop: int = NUM) -> Path:
    """Rows that were not downloaded have no image."""

    def failed(n: int) -> bool:
        return n % 4 == 3

    return plain(
        path, start, stop,
        jpg=lambda n: None if failed(n) else picture(n),
        key=lambda n: f"{n:09d}",
        url=lambda n: f"https://example.org/a/long/address/of/{n}.jpg",
        status=lambda n: "failed_to_download" if failed(n) else "success",
        error_message=lambda n: "HTTP Error 404: Not Found, which is a long message" if failed(n) else None,
    )  # fmt: skip


MAKERS = {"objects": objects, "hub": hub, "bytes": lambda path, *bounds: plain(path, *bounds, image=picture)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_images_in_the_cells_are_read(make: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path / "t.parquet")))
    assert len(source) == NUM and not source.problems
    assert [source.image(n) for n in range(NUM)] == [picture(n) for n in range(NUM)]
    assert source.record(3).captions[0] == "thing 3" and source.name == "t"
    copy = pickle.loads(pickle.dumps(source))
    assert content(copy) == content(source)
    again = open_source(str(tmp_path / "t.parquet"))
    assert again.fingerprint == source.fingerprint
    saved = Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "hf"))
    saved.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "saved")
    assert captions(open_source(str(tmp_path / "saved"))) == captions(source)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_folder_of_parts_as_hubs_lay_it_out(make: Callable[..., Path], tmp_path: Path) -> None:
    for name, start, stop in (
        ("train-00000-of-00002", 0, 5), ("train-00001-of-00002", 5, 9), ("validation-00000-of-00001", 9, 10),
        ("test-00000-of-00001", 10, 12),
    ):  # fmt: skip
        make(tmp_path / "set" / "data" / f"{name}.parquet", start, stop)
    (tmp_path / "set" / "README.md").write_text("# A set\n")
    for path in (tmp_path / "set", tmp_path / "set" / "data"):
        train, val, test = splits(str(path))
        assert [len(part) for part in (train, val, test)] == [9, 1, 2]
        assert test.record(0).captions[0] == "thing 10" and test.image(1) == picture(11)
        assert len(open_source(str(path))) == NUM
        copy = pickle.loads(pickle.dumps(test))
        assert copy.image(1) == picture(11)


def test_files_that_change_are_read_anew(tmp_path: Path) -> None:
    path = objects(tmp_path / "t.parquet")
    before = open_source(str(path)).fingerprint
    objects(path, 3)
    after = open_source(str(path))
    assert len(after) == NUM - 3 and after.fingerprint != before


def test_parts_in_folders_of_their_own(tmp_path: Path) -> None:
    """As the hub's converted files: default/train/0000.parquet."""
    objects(tmp_path / "train" / "0000.parquet", 0, 8)
    objects(tmp_path / "test" / "0000.parquet", 8)
    assert [len(part) for part in splits(str(tmp_path), val_fraction=0.0)] == [8, 0, 4]
    assert len(open_source(str(tmp_path))) == NUM


def test_a_split_column_is_kept(tmp_path: Path) -> None:
    path = objects(tmp_path / "t.parquet", split=lambda n: ("train", "val", "test")[n % 3])
    assert [len(part) for part in splits(str(path))] == [4, 4, 4]
    assert splits(str(path))[2].record(0).captions == ("thing 2",)


def test_an_image_in_two_parts_is_kept_out_of_training(tmp_path: Path) -> None:
    objects(tmp_path / "train.parquet", 0, 8)
    objects(tmp_path / "test.parquet", 6)
    train, _, test = splits(str(tmp_path), val_fraction=0.0)
    assert (len(train), len(test)) == (6, 6)
    assert reasons(train) + reasons(test) == {"two parts": 2}


def test_img2datasets_own_parquet(tmp_path: Path) -> None:
    """Rows that were not downloaded are no problems, and are counted."""
    for number in range(3):
        img2dataset(tmp_path / f"{number:05d}.parquet", 4 * number, 4 * number + 4)
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert len(source) == 9 and not source.problems
    assert "3 rows that were not downloaded" in source.layout
    assert sum(map(len, splits(str(tmp_path)))) == 9


def test_labels_without_captions(tmp_path: Path) -> None:
    features = Features({"img": datasets.Image(), "label": ClassLabel(names=["ant", "bee"])})
    images = [{"bytes": picture(n), "path": None} for n in range(NUM)]
    rows = Dataset.from_dict({"img": images, "label": [n % 2 for n in range(NUM)]}, features=features)
    rows.to_parquet(tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert list(source.class_names) == ["ant", "bee"] and source.record(1).label == 1


def test_rows_without_an_image_or_a_caption_are_named(tmp_path: Path) -> None:
    path = plain(
        tmp_path / "t.parquet",
        image=lambda n: None if n == 0 else {"bytes": b"" if n == 1 else picture(n), "path": None},
        caption=lambda n: "" if n == 2 else "thing",
    )
    source = open_source(str(path))
    assert {(problem.id, problem.reason) for problem in source.problems} == {
        ("t:0", "no image"), ("t:1", "empty file"), ("t:2", "empty caption"),
    }  # fmt: skip


def test_a_cell_that_names_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    path = plain(
        tmp_path / "t.parquet",
        0, 2,
        image=lambda n: {"bytes": picture(0), "path": None} if n else {"bytes": None, "path": "a.png"},
    )  # fmt: skip
    source = open_source(str(path))
    assert {source.image(0), source.image(1)} == {picture(0), picture(1)}


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = plain(
        tmp_path / "t.parquet", photo=picture, mask=lambda n: picture(n + 50), note=lambda n: f"note {n}"
    )
    with pytest.raises(UsageError, match=r"2 columns of type Image.*image_column"):
        open_source(str(path))
    source = open_source(str(path), image_column="mask", caption_columns=("note",))
    assert source.image(0) == picture(50) and source.record(0).captions == ("note 0",)


def test_without_datasets_one_line_says_what_to_install(tmp_path: Path) -> None:
    path = objects(tmp_path / "t.parquet")
    message = r"pip install 'threetowers\[datasets\]'"
    with mock.patch.dict("sys.modules", {"datasets": None}), pytest.raises(UsageError, match=message):
        open_source(str(path))


def test_tables_further_down_are_named(tmp_path: Path) -> None:
    for config in ("small", "large"):
        objects(tmp_path / config / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet.*open one of them"):
        open_source(str(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be read into .*file.*THREETOWERS_CACHE"):
        open_source(str(objects(tmp_path / "t.parquet")))


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    for number in range(2):
        objects(tmp_path / f"{number}.parquet")
    data = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"1\.parquet: it is no parquet file, or a damaged one"):
        open_source(str(tmp_path))


def test_bytes_that_are_no_images_leave_a_table_of_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    path = plain(tmp_path / "t.parquet", 0, 1, image=lambda n: "a.png", sha256=lambda n: b"\x01\x02" * 16)
    assert open_source(str(path)).image(0) == picture(1)
    both = plain(
        tmp_path / "u.parquet", image=picture, sha256=lambda n: b"\x01\x02" * 16, file=lambda n: "a.png"
    )
    assert open_source(str(both)).image(2) == picture(2)
    assert captions(open_source(str(both), image_column="file")).keys() == {"a.png"}
