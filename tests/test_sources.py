"""Sources: whatever a folder, table or shard holds is a sample or a named problem, never lost in silence."""

import csv
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.files import tar
from kit.pictures import picture
from kit.sources import captions, reasons
from threetowers.data.formats.tables import open_table
from threetowers.data.open import open_source, split, splits
from threetowers.data.shards.source import open_shards
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import (
    MAX_CAPTION_CHARS,
    SOURCE_REASONS,
    Source,
    Subset,
    Texts,
    check_problems,
    clean_captions,
    describe,
)
from threetowers.errors import BadSample, DataError, UsageError

NormalForm = Literal["NFC", "NFD"]

UMLAUT = unicodedata.normalize("NFC", "süße Äpfel 1")


def samples(count: int, **fields: object) -> list[ShardSample]:
    return [
        ShardSample(f"{i:06d}", picture(i), "png", (f"caption {i}", f"second {i}"), **fields)  # type: ignore[arg-type]
        for i in range(count)
    ]


def seen_ids(source: Source) -> set[str]:
    return {*captions(source), *(problem.id for problem in source.problems)}


# --- what each source notices


def shard_set(folder: Path) -> str:
    write_shards(folder, samples(7), shard_size=3)
    return str(folder)


def labelled_shards(folder: Path) -> str:
    write_shards(folder, [ShardSample(f"{i}", picture(i), "png", (), i % 3) for i in range(6)])
    (folder / "classnames.txt").write_text("cat\nwild dog\nfox\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return str(folder)


def csv_table(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    rows = ["filepath,title"]
    for i in range(5):
        (folder / f"image {i}.png").write_bytes(picture(i))
        rows.append(f"image {i}.png,a thing {i}")
    (folder / "table.csv").write_text("\n".join(rows))
    return str(folder / "table.csv")


def sidecar_folder(folder: Path) -> str:
    for i in range(5):
        (folder / f"part {i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"part {i % 2}" / f"{i}.PNG").write_bytes(picture(i))
        (folder / f"part {i % 2}" / f"{i}.txt").write_text(f"a thing {i}\nthe same thing\n")
    return str(folder)


def class_folder(folder: Path) -> str:
    for i in range(6):
        (folder / ("zebra", "ant", "cat")[i % 3]).mkdir(parents=True, exist_ok=True)
        (folder / ("zebra", "ant", "cat")[i % 3] / f"{i}.png").write_bytes(picture(i))
    return str(folder)


SOURCES = (shard_set, labelled_shards, csv_table, sidecar_folder, class_folder)


@pytest.mark.parametrize("make", SOURCES)
def test_fingerprint_follows_the_content(make: Callable[[Path], str], tmp_path: Path) -> None:
    path = make(tmp_path / "data")
    before = open_source(path).fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "data", moved)
    assert open_source(path.replace(str(tmp_path / "data"), str(moved))).fingerprint == before
    if make is shard_set:
        shutil.rmtree(path)
        write_shards(path, samples(6), shard_size=3)
    elif make is labelled_shards:
        (Path(path) / "classnames.txt").write_text("cat\nwolf\nfox")
    elif make is csv_table:
        Path(path).write_text(Path(path).read_text().replace("thing 3", "thing 4"))
    else:
        next(Path(path).rglob("3.*")).write_bytes(picture(99))
        next(Path(path).rglob("3.*")).with_suffix(".txt").write_text(
            "new"
        ) if make is sidecar_folder else None
    assert open_source(path).fingerprint != before


def test_read_from_threads_with_more_shards_than_open_files(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", samples(270), shard_size=1)
    source = open_source(str(tmp_path / "s"))
    order = random.Random(0).choices(range(270), k=1500)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.image, order)) == [picture(i) for i in order]


# --- shards


def test_shards_are_written_the_same_every_time(tmp_path: Path) -> None:
    for name, given_samples in (("a", samples(7)), ("b", samples(7)[::-1])):
        write_shards(tmp_path / name, given_samples, shard_size=7)
    names = sorted(entry.name for entry in (tmp_path / "a").iterdir())
    assert names == ["00000.tar", "00000_stats.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "00000.tar") as archive:
        assert {(member.mtime, member.uid) for member in archive} == {(0, 0)}
    with pytest.raises(UsageError, match="holds shards already"):
        write_shards(tmp_path / "a", samples(1))


@pytest.mark.parametrize("key", ["a.b", "", ".hidden", "a\0b"])
def test_keys_that_would_not_be_read_back_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="key"):
        write_shards(tmp_path, [ShardSample(key, b"x", "png", ("a",))])
    assert not list(tmp_path.glob("*.tar"))


def test_repeated_keys_are_refused_in_writing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        write_shards(tmp_path, samples(2) + samples(1))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=130
            ),
            st.binary(min_size=1, max_size=1200),
            st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=3),
        ),
        max_size=8,
        unique_by=lambda sample: sample[0],
    ),
    st.integers(1, 4),
)
def test_shards_round_trip(
    tmp_path: Path, given_samples: list[tuple[str, bytes, list[str]]], size: int
) -> None:
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    paths = write_shards(
        tmp_path / "s", (ShardSample(k, d, "jpg", tuple(c)) for k, d, c in given_samples), shard_size=size
    )
    assert len(paths) == -(-len(given_samples) // size)
    if not paths:
        return
    source = open_shards(str(tmp_path / "s"))
    expected = {key: (data, clean_captions(texts)[0]) for key, data, texts in given_samples}
    found = {
        source.record(i).id.split("/")[1]: (source.image(i), source.record(i).captions)
        for i in range(len(source))
    }
    assert found == {key: value for key, value in expected.items() if value[1]}
    assert {problem.id.split("/")[1] for problem in source.problems} == {
        k for k, v in expected.items() if not v[1]
    }


def test_webdataset_grouping(tmp_path: Path) -> None:
    """Unsorted members, upper case, folders in keys, hidden files, captions from every place they may stand."""
    image = picture(0)
    members = [
        ("list.txt", b"one\n\ntwo\r\n"),
        ("list.JPG", image),
        ("deep/er.v2/0001.jpeg", image),
        ("deep/er.v2/0001.json", json.dumps({"caption": "from json", "url": "x"}).encode()),
        ("many.json", json.dumps({"captions": ["a  b", None, "nan", "c"], "caption": "not this"}).encode()),
        ("many.png", image),
        ("both.json", b'{"caption": null, "width": 3}'),
        ("both.txt", "\ufeffSchöne Äpfel".encode()),
        ("both.webp", image),
        ("broken.json", b'{"caption": '),
        ("broken.txt", b"still here"),
        ("broken.png", image),
        ("latin.txt", "süß".encode("latin-1")),
        ("latin.png", image),
        ("blank.txt", b" \n nan\n"),
        ("blank.png", image),
        ("alone.png", image),
        ("noimage.txt", b"words"),
        ("noimage.jp2", image),
        ("void.png", b""),
        ("void.txt", b"words"),
        ("two.png", image),
        ("two.jpg", image),
        ("two.txt", b"words"),
        ("surrogate.json", b'{"caption": "bad \\ud800 half"}'),
        ("surrogate.png", image),
        ("nested.json", b"[" * 100_000),
        ("nested.png", image),
        ("long.txt", b"x" * 5_000),
        ("long.png", image),
        (".hidden.png", image),
        ("README", b"hello"),
    ]
    random.Random(0).shuffle(members)
    source = open_source(str(tar(tmp_path / "s.tar", members)))
    assert captions(source) == {
        "s/list": ("one", "two"),
        "s/deep/er.v2/0001": ("from json",),
        "s/many": ("a b", "c"),
        "s/both": ("Schöne Äpfel",),
        "s/broken": ("still here",),
        "s/latin": ("s\ufffd\ufffd",),
        "s/two": ("words",),
        "s/surrogate": ("bad \ufffd half",),
        "s/long": ("x" * MAX_CAPTION_CHARS,),
    }
    assert {(problem.id, problem.reason) for problem in source.problems} == {
        ("s/broken", "damaged json"),
        ("s/latin", "caption is not UTF-8"),
        ("s/surrogate", "caption is not UTF-8"),
        ("s/blank", "empty caption"),
        ("s/alone", "no caption"),
        ("s/noimage", "no image"),
        ("s/void", "empty file"),
        ("s/two", "further image"),
        ("s/nested", "damaged json"),
        ("s/README", "no image"),
    }
    assert set(reasons(source)) <= set(SOURCE_REASONS)
    assert all(source.image(i) == image for i in range(len(source)))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a" * 150 + "/" + "b" * 90, "c/" * 40 + "d" * 20, UMLAUT])
def test_long_and_foreign_names(format: int, name: str, tmp_path: Path) -> None:
    members = [(f"{name}.png", picture(0)), (f"{name}.txt", b"words")]
    source = open_source(str(tar(tmp_path / "s.tar", members, format=format)))
    assert captions(source) == {f"s/{name}": ("words",)}


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for kind, name in (
            (tarfile.DIRTYPE, "folder.d"),
            (tarfile.SYMTYPE, "x.png"),
            (tarfile.LNKTYPE, "y.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name, data in (("x.txt", b"words"), ("z.png", picture(0)), ("z.txt", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_source(str(tmp_path / "s.tar"))
    assert captions(source) == {"s/z": ("words",)}
    assert {(p.id, p.reason) for p in source.problems} == {("s/x", "no image"), ("s/y", "no image")}
    assert "a link" in source.problems[0].detail


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    texts = {"a": b"1", "b": b"2", "c": b"-1", "d": b"x", "e": b" 0\n", "f": b"9" * 5000}
    members = [
        (f"{key}.{end}", data)
        for key, text in texts.items()
        for end, data in (("png", picture(0)), ("cls", text))
    ]
    source = open_source(str(tar(tmp_path / "test" / "0.tar", members).parent))
    assert {source.record(i).id: source.record(i).label for i in range(len(source))} == {"0/a": 1, "0/e": 0}
    assert reasons(source) == {"bad label": 4}
    assert (list(source.class_names), list(source.templates)) == (["cat", "dog"], ["a {}"])
    assert "  0/a → dog" in describe(source)


def test_ranges_joins_and_equal_keys(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_shards(tmp_path / folder, samples(6), shard_size=2)
        write_shards(tmp_path / f"{folder}2", samples(2), shard_size=2)
    x, y = tmp_path / "x", tmp_path / "y"
    assert len(open_source(f"{x}/{{00000..00001}}.tar")) == 4
    assert len(open_source(f"{x}/{{00000,00002}}.tar")) == 4
    assert len(open_source(f"{tmp_path}/{{x,y}}/{{00001..00002}}.tar")) == 8
    joined = open_source(f"{x}/00000.tar::{y}::{tmp_path}/x2/{{00000..00000}}.tar")
    assert len(seen_ids(joined)) == len(joined) == 2 + 6 + 2
    assert joined.record(0).id == "x/00000/000000"
    tar(tmp_path / "same" / "00000.tar", [("k.png", picture(0)), ("k.txt", b"a")])
    tar(tmp_path / "same" / "00007.tar", [("k.png", picture(1)), ("k.txt", b"b")])
    assert captions(open_source(str(tmp_path / "same"))) == {"00000/k": ("a",), "00007/k": ("b",)}
    with pytest.raises(DataError, match=r"expected 5 shards, found 3; missing: .*00003.tar"):
        open_source(f"{x}/{{00000..00004}}.tar")
    with pytest.raises(UsageError, match="named twice"):
        open_source(f"{x}/00000.tar::{x}")


@pytest.mark.parametrize("path", ["pipe:cat x.tar", "pipe:rm::x.tar", "x.tar::pipe:curl https://h/x.tar"])
def test_commands_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match="only files and addresses of files are read, no commands"):
        open_source(path)


def test_a_shard_that_changes_or_goes_is_a_bad_sample(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, samples(2))
    changed, gone = open_source(str(tmp_path)), open_source(str(tmp_path))
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"x")
    with pytest.raises(BadSample, match="has changed since it was indexed"):
        changed.image(0)
    shard.write_bytes(whole)
    os.truncate(shard, 600)
    with pytest.raises(BadSample, match="unreadable"):
        changed.image(1)
    shard.unlink()
    with pytest.raises(BadSample, match="unreadable"):
        gone.image(0)


def test_stats_are_held_against_the_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(4))
    stats = tmp_path / "00000_stats.json"
    stats.write_text(json.dumps({"count": 9, "successes": 5}))
    with pytest.raises(DataError, match=r"00000.tar: expected 5 images by 00000_stats.json, found 4"):
        open_source(str(tmp_path))
    stats.write_text("{")
    with pytest.raises(DataError, match=r"00000_stats.json is damaged"):
        open_source(str(tmp_path))
    stats.unlink()
    assert len(open_source(str(tmp_path))) == 4


WRITERS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def damaged_set(folder: Path, format: int) -> tuple[Path, bytes, set[str]]:
    """A shard with short and long names of both kinds of text, without stats; its bytes and sample ids."""
    members = []
    for i in range(6):
        key = f"{i:05d}" if i % 3 or format == tarfile.USTAR_FORMAT else f"{i:05d}" + "x" * 120
        text = ("json", json.dumps({"caption": f"thing {i}"}).encode()) if i % 2 else ("txt", b"thing %d" % i)
        members += [(f"{key}.png", picture(i)), (f"{key}.{text[0]}", text[1])]
    shard = tar(folder / "s.tar", members, format=format)
    return shard, shard.read_bytes(), seen_ids(open_source(str(shard)))


@pytest.mark.parametrize("format", WRITERS)
def test_a_truncated_shard_is_an_error_at_every_place(format: int, tmp_path: Path) -> None:
    shard, data, ids = damaged_set(tmp_path, format)
    end = len(data.rstrip(b"\0"))
    end += -end % 512 + 1024
    for size in sorted({*range(0, len(data), 512), *range(1, len(data), 509)}):
        shard.write_bytes(data[:size])
        if size < end or size % 512:
            with pytest.raises(DataError, match=r"s.tar: .*found"):
                open_source(str(shard))
        else:
            assert seen_ids(open_source(str(shard))) == ids


def test_messages_say_what_is_missing(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [ShardSample("a", bytes(5000), "png", ("x",))])
    os.truncate(shard, 2000)
    with pytest.raises(DataError, match="a file needs the bytes up to 5632, found 0 files in 2000 bytes"):
        open_source(str(tmp_path))


def test_a_damaged_extended_header_is_an_error(tmp_path: Path) -> None:
    name = "x" * 120
    shard = tar(tmp_path / "s.tar", [(f"{name}.png", picture(0)), (f"{name}.txt", b"words")])
    data = shard.read_bytes()
    for damage in (b" pqth=", b" path:", b"x path="):
        shard.write_bytes(data.replace(b" path=", damage[: len(b" path=")], 1))
        with pytest.raises(DataError, match="extended header at byte 512 is damaged"):
            open_source(str(shard))


def test_whole_members_that_are_missing_show_in_the_stats(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, samples(5))
    data = shard.read_bytes()
    second = data.index(b"000001.png")
    third = data.index(b"000002.png")
    shard.write_bytes(data[:second] + data[third:])
    with pytest.raises(DataError, match=r"expected 5 images .* found 4"):
        open_source(str(tmp_path))


def test_a_tail_of_zeros_is_no_end(tmp_path: Path) -> None:
    """What a download leaves that reserved its space first; short tails need the stats to show."""
    (shard,) = write_shards(tmp_path, samples(40))
    data = shard.read_bytes()
    for place in range(0, len(data), 512):
        if data[place + 257 : place + 262] == b"ustar":
            shard.write_bytes(data[:place] + bytes(len(data) - place))
            try:
                source = open_source(str(tmp_path))
            except DataError:
                continue
            assert (len(seen_ids(source)), reasons(source)) == (40, {"no caption": 1})
    (tmp_path / "00000_stats.json").unlink()
    shard.write_bytes(data[:1024] + bytes(len(data) - 1024))
    with pytest.raises(DataError, match="zeros follow"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed"),
        (b"<html>not found</html>" * 100, "expected a file's header at byte 0"),
        (bytes(1024), "no sample in it can be used"),
        (bytes(1024) + b"x" * 512, "more data follows"),
    ],
)
def test_what_is_no_tar(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


# --- tables and folders


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "b b.jpg", f"{UMLAUT}.png", "sub/c.webp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(
            picture(i, {"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:].strip("."), "PNG"))
        )
    return tmp_path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_of_every_tool(images: Path, delimiter: str, encoding: str) -> None:
    with (images / "t.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["", " Image Path", "caption"])
        writer.writerow([0, "a.png", 'says "hi", ok; fine'])
        writer.writerow([1, "b b.jpg", "two\u00a0 words"])
        writer.writerow([2, f"{UMLAUT}.png", "Äpfel"])
        writer.writerow([3, "./sub/c.webp", "c"])
        writer.writerow([4, "sub\\c.webp", "the same"])
    source = open_source(str(images / "t.csv"))
    assert not source.problems
    assert captions(source) == {
        "a.png": ('says "hi", ok; fine',),
        "b b.jpg": ("two words",),
        f"{UMLAUT}.png": ("Äpfel",),
        "sub/c.webp": ("c", "the same"),
    }


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("table", ["NFC", "NFD"])
def test_umlauts_in_both_normal_forms(disk: NormalForm, table: NormalForm, tmp_path: Path) -> None:
    (tmp_path / f"{unicodedata.normalize(disk, UMLAUT)}.png").write_bytes(picture(0))
    (tmp_path / "t.csv").write_text(f"file,text\n{unicodedata.normalize(table, UMLAUT)}.png,x\n")
    source = open_source(str(tmp_path / "t.csv"))
    assert captions(source) == {f"{UMLAUT}.png": ("x",)}
    assert source.image(0) == picture(0)


def test_every_bad_row_is_named(images: Path) -> None:
    lines = [
        b"image,caption_0,caption_1",
        b"a.png,first,",
        b"a.png,second,third",
        b"a.png,,nan",
        b"b b.jpg, ,",
        b"gone.png,x,y",
        b"gone.png,x,y",
        b",x,y",
        b"a.png,x",
        b"a.png,x,y,z",
        b"",
        b"sub/c.webp,s\xfc\xdf,",
        b"sub,a folder,",
    ]
    (images / "t.csv").write_bytes(b"\n".join(lines))
    source = open_source(str(images / "t.csv"))
    assert captions(source) == {"a.png": ("first", "second", "third"), "sub/c.webp": ("s\ufffd\ufffd",)}
    assert sorted((problem.id, problem.reason) for problem in source.problems) == sorted(
        [
            ("a.png", "empty caption"),
            ("b b.jpg", "empty caption"),
            ("gone.png", "missing file"),
            ("t.csv:8", "no path"),
            ("t.csv:9", "wrong number of fields"),
            ("t.csv:10", "wrong number of fields"),
            ("sub/c.webp", "caption is not UTF-8"),
            ("sub", "missing file"),
        ]
    )
    assert "a.png: empty caption (t.csv:4)" in map(str, source.problems)
    assert set(reasons(source)) <= set(SOURCE_REASONS)
    text = describe(source)
    assert "`image`" in text
    assert "`caption_0`, `caption_1`" in text
    assert "2 samples, 8 problems (" in text
    assert "empty caption: 2" in text
    with pytest.raises(DataError, match=r"8 of 8 .* = 0\.01 (?s:.*)\n  a.png: empty caption \(t.csv:4\)\n"):
        check_problems([source])
    check_problems([source], limit=1.0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=6),
    st.sampled_from(",;\t"),
)
def test_captions_survive_a_csv(tmp_path: Path, texts: list[str], delimiter: str) -> None:
    if delimiter == "\t":  # tab files are written without quoting
        texts = [" ".join(text.split()).strip('"') for text in texts]
    (tmp_path / "a.png").write_bytes(b"x")
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["image", "caption"], *(["a.png", text] for text in texts)])
    expected = [clean_captions([text])[0] for text in texts]
    source = open_table(tmp_path / "t.csv")
    assert captions(source).get("a.png", ()) == tuple(caption for one in expected for caption in one)
    assert reasons(source)["empty caption"] == expected.count(())


@pytest.mark.parametrize(
    ("header", "image", "texts"),
    [
        ("filepath,title", "filepath", ["title"]),
        ("title,filepath,caption", "filepath", ["caption"]),
        ("sentence_2,img,sentence_1", "img", ["sentence_2", "sentence_1"]),
        ("file_name,Captions", "file_name", ["Captions"]),
        ("caption,image,caption", "image", ["caption", "caption.1"]),
        ("wo,id,was", "wo", ["was"]),
        ("image,source,words", "source", ["words"]),
    ],
)
def test_columns_are_recognised(images: Path, header: str, image: str, texts: list[str]) -> None:
    cells = {"wo": "a.png", "id": "17", "was": "a long description", "source": "a.png", "words": "a long one"}
    cells |= (
        dict.fromkeys(("filepath", "img", "file_name", "image"), "a.png")
        if "source" not in header
        else {"image": "7"}
    )
    row = [cells.get(name, f"text {i}") for i, name in enumerate(header.split(","))]
    (images / "t.csv").write_text(f"{header}\n{','.join(row)}\n")
    source = open_table(images / "t.csv")
    assert captions(source).keys() == {"a.png"}
    assert len(source.record(0).captions) == len(texts)
    assert f"`{image}`, captions in {', '.join(f'`{text}`' for text in texts)}" in source.layout


def test_columns_can_be_named(images: Path) -> None:
    (images / "t.csv").write_text("image,other,caption,alt\na.png,b b.jpg,no,yes\n")
    path = str(images / "t.csv")
    assert captions(open_source(path, image_column="other", caption_columns=("alt", "caption"))) == {
        "b b.jpg": ("yes", "no")
    }
    with pytest.raises(
        UsageError, match=r"no column `captoin`; did you mean `caption`\? Its columns: image, other"
    ):
        open_source(path, caption_columns=("captoin",))
    with pytest.raises(UsageError, match=r"no column `zzz`\. Its columns: image, other, caption, alt"):
        open_source(path, image_column="zzz")
    with pytest.raises(UsageError, match="is no table"):
        open_source(sidecar_folder(images / "s"), image_column="other")


def test_jsonl(images: Path) -> None:
    rows = [
        {"image": "a.png", "captions": ["one", "two", None, ""]},
        {"image": "b b.jpg", "captions": "three"},
        {"image": "sub/c.webp", "captions": []},
        {"captions": ["no image"]},
        [1, 2],
        {"image": "b b.jpg", "captions": json.loads("[" * 400 + "]" * 400)},
    ]
    lines = [json.dumps(row) for row in rows] + ['{"image": "a.png", ', "", "[" * 100_000]
    (images / "t.jsonl").write_text("\n".join(lines))
    source = open_source(str(images / "t.jsonl"))
    assert captions(source) == {"a.png": ("one", "two"), "b b.jpg": ("three",)}
    assert reasons(source) == {"empty caption": 2, "no path": 1, "damaged json": 3}


def test_parquet(images: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"path": ["a.png", "gone.png"], "texts": [["one", "two"], ["x"]], "size": [1, 2]})
    parquet.write_table(table, images / "t.parquet")
    source = open_source(str(images / "t.parquet"))
    assert captions(source) == {"a.png": ("one", "two")}
    assert reasons(source) == {"missing file": 1}
    (images / "t.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(DataError, match="parquet"):
        open_source(str(images / "t.parquet"))


def test_json_list_in_a_csv_cell(images: Path) -> None:
    with (images / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "filename"], [json.dumps(["one", "two, three"]), "a.png"]])
    assert captions(open_source(str(images / "t.csv"))) == {"a.png": ("one", "two, three")}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", DataError, "no row"),
        ("image,caption\n", DataError, "no row"),
        ("a.png,a cat\nb.png,a dog\n", DataError, "Put column names above it"),
        (
            'image,caption\na.png,"never closed\nb.png,x\nc.png,y\n',
            DataError,
            r"t.csv:2: damaged row \(the quotes do not pair up",
        ),
        ("image,caption\ngone.png,x\n", DataError, r"no sample.*missing file: 1\n  gone.png: missing file"),
        ("number,caption\n1,x\n", UsageError, "no column holds paths of images"),
        ("image,number\na.png,\n", UsageError, "no column holds captions"),
    ],
)
def test_tables_that_cannot_be_meant(images: Path, text: str, error: type[Exception], message: str) -> None:
    (images / "t.csv").write_text(text)
    with pytest.raises(error, match=message):
        open_source(str(images / "t.csv"))


def test_folder_with_sidecars(images: Path) -> None:
    (images / "a.txt").write_text("one\n\n two  words \n")
    (images / "sub" / "c.txt").write_text("nan\n")
    (images / f"{UMLAUT}.txt").write_bytes("süß".encode("latin-1"))
    (images / ".hidden.png").write_bytes(b"x")
    (images / "loop").symlink_to(images)
    source = open_source(str(images))
    assert captions(source) == {"a.png": ("one", "two words"), f"{UMLAUT}.png": ("s\ufffd\ufffd",)}
    assert {(problem.id, problem.reason) for problem in source.problems} == {
        ("b b.jpg", "no caption"),
        ("sub/c.webp", "empty caption"),
        (f"{UMLAUT}.png", "caption is not UTF-8"),
    }


def test_class_folders(tmp_path: Path) -> None:
    class_folder(tmp_path)
    (tmp_path / "ant" / "deep").mkdir()
    (tmp_path / "ant" / "deep" / "x.jpg").write_bytes(picture(0))
    (tmp_path / "loose.png").write_bytes(picture(0))
    source = open_source(str(tmp_path))
    assert list(source.class_names) == ["ant", "cat", "zebra"]
    found = {source.record(i).id: source.record(i).label for i in range(len(source))}
    assert found["zebra/0.png"] == 2
    assert found["ant/deep/x.jpg"] == 0
    assert [(problem.id, problem.reason) for problem in source.problems] == [("loose.png", "no class")]


def test_a_folder_with_a_table_is_not_taken_for_classes(images: Path) -> None:
    (images / "other").mkdir()
    (images / "other" / "x.png").write_bytes(picture(0))
    (images / "captions.csv").write_text("image,caption\na.png,x\n")
    assert captions(open_source(str(images))) == {"a.png": ("x",)}
    (images / "more.csv").write_text("image,caption\na.png,x\n")
    with pytest.raises(DataError, match=r"open one of them, for example .*captions.csv"):
        open_source(str(images))
    (images / "captions.csv").rename(images / "metadata.csv")
    assert captions(open_source(str(images))) == {"a.png": ("x",)}


def test_a_file_that_goes_away_is_a_bad_sample(images: Path) -> None:
    source = open_source(csv_table(images / "t"))
    (images / "t" / "image 0.png").unlink()
    with pytest.raises(BadSample, match=r"image 0.png: missing file"):
        source.image(0)


def test_a_path_that_is_not_there(images: Path) -> None:
    csv_table(images / "flickr")
    for path, message in [
        (images / "flikcr", "did you mean .*flickr"),
        (images / "flickr" / "tabel.csv", "did you mean .*table.csv"),
        (images / "flickr" / "qqqqqqqq.tar", "holds image 0.png"),
        (images / "no" / "where", "folder .*no does not exist"),
        (images / "a.png", "a table ends in"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(str(path))


def test_terminal_codes_in_captions_are_not_shown(images: Path) -> None:
    (images / "t.csv").write_text("image,caption\na.png,red \x1b[31m alert\x07 \u202e\n")
    text = describe(open_source(str(images / "t.csv")))
    assert text.replace("\n", "").isprintable()
    assert "red \ufffd[31m alert\ufffd" in text


# --- parts


class Named:
    """A source of bare ids."""

    class_names, templates, problems, fingerprint, name = ("x",), ("{}",), (), "f", "named"

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def record(self, index: int) -> object:
        from threetowers.data.source import Record

        return Record(self.ids[index], ("c",), 0)

    def image(self, index: int) -> bytes:
        return b""


@given(st.lists(st.text(max_size=5), unique=True, min_size=1, max_size=60), st.integers(0, 9), st.data())
def test_split_depends_on_ids_alone(ids: list[str], seed: int, data: st.DataObject) -> None:
    def parts(ids: list[str]) -> list[set[str]]:
        found = split(Named(ids), val_fraction=0.3, test_fraction=0.2, seed=seed)  # type: ignore[arg-type]
        assert [list(part.class_names) for part in found] == [["x"]] * 3
        return [{part.record(i).id for i in range(len(part))} for part in found]

    whole = parts(ids)
    assert sorted(id for part in whole for id in part) == sorted(ids)
    kept = data.draw(st.permutations(ids))[: len(ids) // 2]
    assert parts(kept) == [part & set(kept) for part in whole]


def test_split_sizes_and_seeds() -> None:
    source = Named([f"{i}" for i in range(4000)])
    train, val, test = split(source, val_fraction=0.1, test_fraction=0.2)  # type: ignore[arg-type]
    assert abs(len(val) - 400) < 60
    assert abs(len(test) - 800) < 90
    other = split(source, val_fraction=0.1, test_fraction=0.2, seed=1)[1]  # type: ignore[arg-type]
    assert other.fingerprint != val.fingerprint
    assert isinstance(val, Subset)
    assert len({train.fingerprint, val.fingerprint, test.fingerprint}) == 3
    for fractions in ((-0.1, 0.1), (0.5, 0.5), (0.0, 1.2)):
        with pytest.raises(UsageError, match="sum to less than 1"):
            split(source, val_fraction=fractions[0], test_fraction=fractions[1])  # type: ignore[arg-type]


def test_problems_follow_their_sample_into_its_part(images: Path) -> None:
    lines = ["image,caption"] + [f"gone {i}.png,x" for i in range(40)] + ["a.png,x", "b b.jpg,y"]
    (images / "t.csv").write_text("\n".join(lines))
    source = open_source(str(images / "t.csv"))
    parts = split(source, val_fraction=0.3, test_fraction=0.3)
    assert sum(len(part.problems) for part in parts) == 40
    assert all(part.problems for part in parts)


def test_split_folders_are_used(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", samples(40))
    assert sum(map(len, splits(str(tmp_path), val_fraction=0.3, test_fraction=0.3))) == 40
    write_shards(tmp_path / "valid", samples(3))
    train, val, test = splits(str(tmp_path), val_fraction=0.3, test_fraction=0.3)
    assert (len(train) + len(test), len(val)) == (40, 3)
    write_shards(tmp_path / "test", samples(2))
    assert [len(part) for part in splits(str(tmp_path))] == [40, 3, 2]
    assert [record.id for record in map(open_source(str(tmp_path)).record, (0, 40, 43))] == [
        "train/00000/000000", "val/00000/000000", "test/00000/000000"
    ]  # fmt: skip


def test_split_folders_need_the_same_classes(tmp_path: Path) -> None:
    class_folder(tmp_path / "train")
    class_folder(tmp_path / "test")
    assert [len(part) for part in splits(str(tmp_path), val_fraction=0.0)] == [6, 0, 6]
    shutil.rmtree(tmp_path / "test" / "cat")
    with pytest.raises(DataError, match="has other classes than"):
        splits(str(tmp_path))


@given(st.lists(st.text(st.characters())))
def test_texts_is_a_list_in_a_buffer(texts: list[str]) -> None:
    packed = Texts(texts)
    assert list(packed) == texts == packed[:]
    assert packed[-2:] == texts[-2:]
    assert list(pickle.loads(pickle.dumps(packed))) == texts
