"""Files in a folder that are neither images that are read nor their captions: counted and named, or noise."""

from pathlib import Path

import pytest

from kit.pictures import picture
from kit.sources import captions, reasons
from threetowers.data.formats.places import find_file
from threetowers.data.open import open_source, splits
from threetowers.data.source import IMAGE_ENDINGS, PICTURE_ENDINGS, SOURCE_REASONS
from threetowers.errors import DataError

UNREAD = [ending for ending in PICTURE_ENDINGS if ending not in IMAGE_ENDINGS]


def put(folder: Path, *names: str, text: str = "thing") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text) if name.lower().endswith(".txt") else path.write_bytes(picture(0))


def found(path: Path) -> set[tuple[str, str]]:
    return {(problem.id, problem.reason) for problem in open_source(str(path)).problems}


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("ending", UNREAD)
def test_pictures_of_other_formats_are_named(ending: str, upper: bool, tmp_path: Path) -> None:
    ending = ending.upper() if upper else ending
    put(tmp_path, "a.jpg", "a.txt", f"b.{ending}", "b.txt", "b.json", f"sub/c.{ending}")
    assert found(tmp_path) == {
        (f"b.{ending}", "unsupported format"),
        (f"sub/c.{ending}", "unsupported format"),
    }
    put(tmp_path / "classes", "ant/a.png", "bee/b.png", f"bee/c.{ending}", f"d.{ending}")
    assert found(tmp_path / "classes") == {
        (f"bee/c.{ending}", "unsupported format"),
        (f"d.{ending}", "unsupported format"),
    }


def test_a_folder_of_other_formats_alone_says_so(tmp_path: Path) -> None:
    put(tmp_path, *(f"{n}.jxl" for n in range(3)), *(f"{n}.txt" for n in range(3)))
    with pytest.raises(
        DataError, match=r"unsupported format: 3\n  0.jxl: .*convert it, its caption is 0.txt"
    ):
        open_source(str(tmp_path))


def test_the_same_picture_in_another_format_is_no_loss(tmp_path: Path) -> None:
    """As a camera writes raw data beside a JPEG."""
    put(tmp_path, "a.jpg", "a.txt", "a.cr2", "a.jxl")
    assert not found(tmp_path)


@pytest.mark.parametrize("ending", ["TXT", "Txt", "txt"])
@pytest.mark.parametrize("image", ["a.jpg", "A.JPG", "a.b.PNG", "a..jpeg"])
def test_endings_in_any_case(image: str, ending: str, tmp_path: Path) -> None:
    put(tmp_path, image, f"{image.rpartition('.')[0]}.{ending}")
    assert captions(open_source(str(tmp_path))) == {image: ("thing",)}


def test_texts_without_an_image_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.txt", "b.txt", "c.TXT", "sub/d.txt", "sub/e.png", "sub/e.txt")
    assert found(tmp_path) == {("b.txt", "no image"), ("c.TXT", "no image"), ("sub/d.txt", "no image")}
    assert set(reasons(open_source(str(tmp_path)))) <= set(SOURCE_REASONS)


@pytest.mark.parametrize("name", ["README.txt", "license.txt", "classnames.txt", "Notes.TXT"])
def test_texts_about_a_folder_are_no_captions(name: str, tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.txt", name, ".hidden.txt", "sub/.b.png", "__MACOSX/._a.jpg")
    assert not found(tmp_path)
    put(tmp_path / "deep", "x/a.jpg", "x/a.txt", "anything at all.txt")
    assert not found(tmp_path / "deep")
    put(tmp_path / "classes", "ant/a.png", "bee/b.png", "words.txt", "ant/notes.txt")
    assert not found(tmp_path / "classes")


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.txt", "b.txt", "c.jpg", "d.txt")
    for name in ("b.jpg", "c.txt", "folder", "e.jxl", "f.jpg"):
        (tmp_path / name).symlink_to(tmp_path / "gone" / name)
    assert found(tmp_path) == {
        ("b.jpg", "unreadable"), ("c.jpg", "unreadable"), ("d.txt", "no image"), ("folder", "missing file"),
        ("e.jxl", "unsupported format"), ("f.jpg", "no caption"),
    }  # fmt: skip
    put(tmp_path / "classes", "ant/a.png", "bee/b.png")
    (tmp_path / "classes" / "bee" / "c.png").symlink_to(tmp_path / "gone")
    (tmp_path / "classes" / "cat").symlink_to(tmp_path / "gone")
    assert found(tmp_path / "classes") == {("bee/c.png", "missing file"), ("cat", "missing file")}


def test_what_is_left_out_of_split_folders_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "train/a.txt", "train/b.jxl", "test/c.jpg", "test/c.txt", "test/d.txt")
    train, _, test = splits(str(tmp_path), val_fraction=0.0)
    assert (reasons(train), reasons(test)) == ({"unsupported format": 1}, {"no image": 1})
    assert "not read" not in train.layout
    put(tmp_path, "unlabelled/x.jpg", ".cache/y.jpg")
    assert splits(str(tmp_path))[0].layout.endswith("; not read: unlabelled")
    assert open_source(str(tmp_path)).layout.endswith("; not read: unlabelled")
    assert found(tmp_path) == {("train/b.jxl", "unsupported format"), ("test/d.txt", "no image")}


def test_every_file_that_looks_like_a_sample_is_one_or_is_named(tmp_path: Path) -> None:
    """Whatever the combination of endings, a name is a sample, a problem, or a caption or copy of a sample."""
    endings = ("jpg", "PNG", "jxl", "txt", "TXT")
    for number in range(1 << len(endings)):
        put(tmp_path, *(f"x{number}.{ending}" for bit, ending in enumerate(endings) if number >> bit & 1))
    source = open_source(str(tmp_path))
    named = {record.id for record in map(source.record, range(len(source)))} | {p.id for p in source.problems}
    stems = {name.partition(".")[0] for name in named}
    assert stems == {f"x{number}" for number in range(1, 1 << len(endings))}
    assert all(find_file(str(tmp_path), name) for name in named)
