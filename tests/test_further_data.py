"""Data as they are downloaded and exported: folders, parts, cells and shards in further forms that people have."""

import io
import json
import tarfile
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from kit.pictures import picture
from kit.sources import captions
from threetowers.data.cells import cell_texts
from threetowers.data.open import open_source, split, splits
from threetowers.data.source import Drawn, Subset
from threetowers.errors import DataError, UsageError


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


def shard(path: Path, members: Mapping[str, Any]) -> str:
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


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("b'a dog'", ["a dog"]),
        ("[b'a dog', b\"it's b\"]", ["a dog", "it's b"]),
        ("[b'a dog' b'b']", ["a dog", "b"]),
        (b"a dog", ["a dog"]),
        ([b"a dog", "b"], ["a dog", "b"]),
        ('{"0": "a dog", "1": "b"}', ["a dog", "b"]),
        ({"0": "a dog", "1": "b"}, ["a dog", "b"]),
    ],
)
def test_bytes_and_numbered_items_are_texts(cell: Any, texts: list[str]) -> None:
    assert cell_texts(cell) == texts


@pytest.mark.parametrize("text", ["b'a' and b'b'", "b'", "band", "[b'a', __import__('os')]"])
def test_what_only_begins_like_bytes_is_a_text(text: str) -> None:
    assert cell_texts(text) == [text]


def test_a_cell_without_a_text_is_named_with_what_it_holds(tmp_path: Path) -> None:
    pictures(tmp_path)
    cells = [{"blip": "a dog", "score": 1}, "", "nan", *map(caption, range(24))]
    source = open_source(table(tmp_path / "t.jsonl", {"image": image, "caption": lambda n: cells[n]}))
    assert list(map(str, source.problems)) == [
        "0.png: empty caption (t.jsonl:1: `caption` holds {'blip': 'a dog', 'score': 1})",
        "1.png: empty caption (t.jsonl:2)",
        "2.png: empty caption (t.jsonl:3)",
    ]


TEXT_FILES = {
    b"a dog\nb": ("a dog", "b"),
    b"\xff\xfe" + "ein gro\u00dfer Hund\r\nb".encode("utf-16-le"): ("ein gro\u00dfer Hund", "b"),
    b"\xfe\xff" + "a dog".encode("utf-16-be"): ("a dog",),
    b'["a dog", "b"]\n': ("a dog", "b"),
    b'{"en": "a dog",\n "de": "b"}': ("a dog", "b"),
    b"[untitled]\nb": ("[untitled]", "b"),
}


@pytest.mark.parametrize("text", TEXT_FILES)
def test_text_files_in_utf_16_and_with_a_list_are_read(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "folder" / "a.png", picture(0))
    put(tmp_path / "folder" / "a.txt", text)
    shard(tmp_path / "a.tar", {"a.png": picture(0), "a.txt": text})
    for place, id in (("folder", "a.png"), ("a.tar", "a/a")):
        source = open_source(str(tmp_path / place))
        assert captions(source) == {id: TEXT_FILES[text]} and not source.problems


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (["a dog", "b"], ("a dog", "b")),
        ("a dog", ("a dog",)),
        ([{"caption": "a dog"}, {"raw": "b"}], ("a dog", "b")),
    ],
)
def test_the_json_of_a_shard_may_be_the_captions_themselves(
    tmp_path: Path, document: Any, expected: tuple[str, ...]
) -> None:
    members = {"a.png": picture(0), "a.json": json.dumps(document)}
    assert captions(open_source(shard(tmp_path / "a.tar", members))) == {"a/a": expected}
    with_text = shard(tmp_path / "b.tar", members | {"a.txt": "beside"})
    assert captions(open_source(with_text)) == {"b/a": ("beside",)}


def test_a_list_of_numbers_in_the_json_of_a_shard_is_no_caption(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": picture(0), "a.json": "[[1, 2], [3, 4]]"})
    with pytest.raises(DataError, match="empty caption"):
        open_source(path)


@pytest.mark.parametrize("text", ["0.txt", "0.caption.txt"])
def test_images_with_two_endings_of_a_sample_belong_to_its_text(tmp_path: Path, text: str) -> None:
    members = {"0.rgb.png": picture(0), "0.mask.png": picture(1), text: "a dog"}
    source = open_source(shard(tmp_path / "a.tar", members))
    assert captions(source) == {"a/0": ("a dog",)} and source.image(0) == picture(0)
    assert str(source.problems[0]).startswith("a/0: further image (rgb.png is used; has rgb.png, mask.png")


def test_numbered_images_without_captions_are_no_sample_of_a_text(tmp_path: Path) -> None:
    members = {f"DSC.{n:04d}.png": picture(n) for n in range(3)} | {"DSC.txt": "a dog"}
    with pytest.raises(DataError, match="no caption: 3"):
        open_source(shard(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    "cell",
    [
        lambda n: {"path": f"{n}.png", "width": 3},
        lambda n: [f"{n}.png"],
        lambda n: {"bytes": None, "path": f"{n}.png"},
        lambda n: [{"file_name": f"{n}.png"}],
    ],
)
def test_paths_of_images_in_objects_and_lists_are_read(tmp_path: Path, cell: Callable[[int], Any]) -> None:
    pictures(tmp_path)
    source = open_source(table(tmp_path / "t.jsonl", {"image": cell, "caption": caption}))
    assert captions(source)["3.png"] == ("thing number 3",) and not source.problems


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (["0.png", "1.png"], "column `image` holds ['0.png', '1.png']"),
        (3, "column `image` holds 3"),
        (None, "column `image` is empty"),
        ("/9j/" * 2000, "column `image` holds 8000 characters, which are no path; write images in base64"),
    ],
)
def test_a_cell_without_a_path_is_named_with_what_it_holds(tmp_path: Path, cell: Any, said: str) -> None:
    pictures(tmp_path)
    path = table(tmp_path / "t.jsonl", {"image": lambda n: cell if n == 2 else image(n), "caption": caption})
    (problem,) = open_source(path).problems
    assert problem.reason == "no path" and problem.detail.startswith(said) and len(str(problem)) < 200


@pytest.mark.parametrize(("name", "there"), [("a.PNG", "a.png"), ("A", "a.png"), ("sub\\b.jpg", "b.JPG")])
def test_a_missing_image_is_named_with_the_file_that_is_there(tmp_path: Path, name: str, there: str) -> None:
    for file in ("a.png", "sub/b.JPG"):
        put(tmp_path / file, picture(0))
    path = table(tmp_path / "t.jsonl", {"image": lambda n: (name, "a.png")[n], "caption": caption}, 2)
    (problem,) = open_source(path).problems
    assert problem.detail.endswith(f"; there is {there}")


@pytest.mark.parametrize("name", ["train.json", "t.jsonl", "T.JSON"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_of_objects_is_a_table(tmp_path: Path, name: str, indent: int | None) -> None:
    pictures(tmp_path / "images")
    rows = [{"image": image(n // 2), "caption": caption(n)} for n in range(48)]
    put(tmp_path / name, "\ufeff " + json.dumps([*rows, 3], indent=indent))
    source = open_source(str(tmp_path / name))
    assert captions(source)["1.png"] == (caption(2), caption(3)) and len(source) == 24
    assert list(map(str, source.problems)) == [f"{name}:49: damaged json (not an object)"]


def test_a_json_list_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path)
    put(tmp_path / "t.json", '[{"image": "0.png", "caption": "a dog"}, {"image"')
    with pytest.raises(DataError, match="a damaged one"):
        open_source(str(tmp_path / "t.json"))


def shard_of(path: Path, first: int, num: int = 8) -> None:
    samples = range(first, first + num)
    shard(
        path,
        {f"{n}.png": picture(n) for n in samples}
        | {f"{n}.txt": caption(n) for n in samples}
        | {"x.txt": "x"},
    )


@pytest.mark.parametrize(
    "names",
    [
        ("cc3m-train-0000", "cc3m-validation-0000", "cc3m-test-0000"),
        ("train2017/00000", "val2017/00000", "test2017/00000"),
        ("train_a/00000", "valid_a/00001", "test_a/00002"),
    ],
)
def test_the_names_of_shards_say_their_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        shard_of(tmp_path / f"{name}.tar", 100 * number, 8 + number)
    parts = splits(str(tmp_path))
    assert list(map(len, parts)) == [8, 9, 10]
    assert parts[1].record(0).captions == (caption(100),)
    assert [len(part.problems) for part in parts] == [1, 1, 1]
    assert "the names of its shards say their parts" in parts[0].layout
    assert len(splits(str(tmp_path), split_column=None)[1]) < 9


@pytest.mark.parametrize(
    "names", [("a-train-0", "b-train-1"), ("a", "test"), ("train-0", "other"), ("val", "test")]
)
def test_other_names_of_shards_are_no_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        shard_of(tmp_path / f"{name}.tar", 100 * number)
    assert len(splits(str(tmp_path), val_fraction=0, test_fraction=0)[0]) == 16


@pytest.mark.parametrize("names", [("training", "dev"), ("Train", "Test")])
def test_folders_of_shards_are_parts_by_all_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        shard_of(tmp_path / name / "0.tar", 100 * number, 8 + number)
    parts = splits(str(tmp_path), val_fraction=0, test_fraction=0)
    assert sorted(map(len, parts)) == [0, 8, 9] and len(parts[0]) == 8


def test_what_lies_beside_shards_is_named(tmp_path: Path) -> None:
    shard_of(tmp_path / "0.tar", 0)
    assert "not read" not in open_source(str(tmp_path)).layout
    pictures(tmp_path, 3)
    shard_of(tmp_path / "more" / "1.tar", 100)
    for name in ("2.tar.part", "0_stats.json.bak", "x.parquet"):
        put(tmp_path / name, "")
    layout = open_source(str(tmp_path)).layout
    assert layout.endswith("; not read: 3 images beside the shards, 1 shards in subfolders, 2.tar.part")
    assert "not read" not in open_source(str(tmp_path / "0.tar")).layout


def test_a_table_beside_images_with_texts_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    for number in range(3):
        put(tmp_path / f"{number}.txt", caption(number))
    table(tmp_path / "captions.jsonl", {"image": image, "caption": caption})
    assert "not read: captions.jsonl" in open_source(str(tmp_path)).layout


@pytest.mark.parametrize("beside", ["README.md", "__MACOSX/x", ".DS_Store"])
def test_parts_in_the_only_folder_of_an_archive_are_kept(tmp_path: Path, beside: str) -> None:
    put(tmp_path / beside, "")
    for number, part in enumerate(("train", "val", "test")):
        pictures(tmp_path / "set" / part, 5, 100 * number)
        table(tmp_path / "set" / part / "metadata.jsonl", {"image": image, "caption": caption}, 5)
    assert list(map(len, splits(str(tmp_path)))) == [5, 5, 5]
    assert len(open_source(str(tmp_path))) == 15


def test_a_folder_that_holds_only_a_link_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(DataError):
        open_source(str(tmp_path))


def test_a_file_of_captions_beside_the_only_folder_is_named(tmp_path: Path) -> None:
    pictures(tmp_path / "images" / "train", 3)
    pictures(tmp_path / "images" / "val", 3)
    put(tmp_path / "captions.json", "{}")
    with pytest.raises(DataError, match=r"for example .*captions\.json"):
        open_source(str(tmp_path))


SIDECARS = {
    "{}.caption": "a dog {}",
    "{}.png.txt": "a dog {}",
    "{}.json": '{{"caption": "a dog {}", "tags": "x"}}',
    "{}.JSON": '["a dog {}"]',
}


@pytest.mark.parametrize("name", SIDECARS)
def test_captions_beside_images_have_other_endings(tmp_path: Path, name: str) -> None:
    for folder in ("10_dog", "5_cat"):  # which would be classes
        pictures(tmp_path / folder, 3)
        for number in range(3):
            put(tmp_path / folder / name.format(number), SIDECARS[name].format(number))
    source = open_source(str(tmp_path))
    assert captions(source)["5_cat/2.png"] == ("a dog 2",) and len(source) == 6 and not source.problems


def test_of_several_files_beside_an_image_the_txt_is_read_first(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    for number, endings in enumerate((("txt", "caption", "json"), ("caption", "json"), ("json",))):
        for ending in endings:
            put(tmp_path / f"{number}.{ending}", '{"text": "json"}' if ending == "json" else ending)
    assert captions(open_source(str(tmp_path))) == {
        "0.png": ("txt",),
        "1.png": ("caption",),
        "2.png": ("json",),
    }


def test_json_without_captions_leaves_folders_classes(tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        pictures(tmp_path / folder, 3)
        put(tmp_path / folder / "0.json", '{"shapes": [], "imageHeight": 3}')
    assert open_source(str(tmp_path)).class_names == ["cat", "dog"]


def test_an_image_whose_json_has_no_caption_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    put(tmp_path / "0.txt", "a dog")
    put(tmp_path / "1.json", '{"blip": "a cat"}')
    (problem,) = open_source(str(tmp_path)).problems
    assert str(problem) == "1.png: empty caption (1.json holds no text under a usual key)"


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    put(tmp_path / "0.tar", "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    with pytest.raises(DataError, match="git lfs pull"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["tar", "jsonl", "parquet"])
def test_missing_files_of_a_counted_set_are_said(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path / "data" / "images", 8)
    for number in (0, 2):
        name = tmp_path / "data" / f"train-{number:05d}-of-00003.{kind}"
        if kind == "tar":
            shard_of(name, 10 * number)
        elif kind == "jsonl":
            table(name, {"image": image, "caption": caption}, 8)
        else:
            rows = [{"image": {"bytes": picture(n)}, "caption": caption(n)} for n in range(8)]
            parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    said = "only 2 of the 3 files train-* are there"
    assert said in open_source(str(tmp_path / "data")).layout
    (tmp_path / "data" / f"train-00001-of-00003.{kind}").write_bytes(name.read_bytes())
    assert said not in open_source(str(tmp_path / "data")).layout


def test_an_image_in_a_list_in_a_cell_is_no_missing_file(tmp_path: Path) -> None:
    rows = [{"images": [{"bytes": picture(n), "path": image(n)}], "caption": caption(n)} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises((DataError, UsageError), match=r"no column holds paths of images|no path: 3"):
        open_source(str(tmp_path / "t.parquet"))


def test_a_part_of_shards_is_divided_by_the_stored_hashes_as_by_its_ids(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0", "test-0", "train-1")):
        shard_of(tmp_path / f"{name}.tar", 100 * number, 30)
    train, val, _ = splits(str(tmp_path), val_fraction=0.3)
    whole = Subset(
        open_source(str(tmp_path)), array("q", [*range(30, 90)]), "set/train"
    )  # the names are sorted
    plain = split(whole, val_fraction=0.3, test_fraction=0.0)
    assert [captions(part) for part in (train, val)] == [captions(part) for part in plain[:2]]
    assert len(train) + len(val) == 60 and len(val) > 5
    assert isinstance(train, Subset) and isinstance(train.source, Drawn)


def test_what_is_said_of_equal_images_is_true_of_given_parts(tmp_path: Path) -> None:
    pictures(tmp_path)
    put(tmp_path / "copy.png", picture(0))
    path = table(
        tmp_path / "t.jsonl",
        {
            "image": lambda n: "copy.png" if n == 24 else image(n),
            "caption": caption,
            "split": lambda n: "test" if n == 24 else "train",
        },
        25,
    )
    assert len(splits(path)[2]) == 1
    assert "parts that are drawn keep them together" in open_source(path).layout


def test_blanks_before_the_quotes_of_a_csv_are_no_part_of_its_fields(tmp_path: Path) -> None:
    pictures(tmp_path)
    rows = "".join(f'{n}.png, "a dog, {n}"\n' for n in range(24))
    put(tmp_path / "t.csv", f"image, caption\n{rows}")
    source = open_source(str(tmp_path / "t.csv"))
    assert captions(source)["3.png"] == ("a dog, 3",) and len(source) == 24 and not source.problems
    put(tmp_path / "u.csv", 'image,caption\n0.png, "red" dog\n1.png, a 5" nail\n')
    assert captions(open_source(str(tmp_path / "u.csv"))) == {
        "0.png": ('"red" dog',),
        "1.png": ('a 5" nail',),
    }


@pytest.mark.parametrize("name", ["*.tar", "0000?.tar"])
def test_wildcards_are_answered_with_what_to_give(tmp_path: Path, name: str) -> None:
    shard_of(tmp_path / "00000.tar", 0)
    with pytest.raises(DataError, match="wildcards mean nothing here: give the folder"):
        open_source(str(tmp_path / name))
