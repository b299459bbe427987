"""Shards as people have them: very many, in subfolders, compressed, with dots, further images and other captions."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.sources import captions, reasons
from threetowers.data.open import open_source, splits
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import Source, check_problems, describe
from threetowers.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "cache"))


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def problems(source: Source) -> dict[str, str]:
    return {problem.id: str(problem) for problem in source.problems}


# --- many shards

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from threetowers.config import InputConfig
from threetowers.data.loader import BatchReader, batches
from threetowers.data.open import open_source
from threetowers.data.order import Order
from threetowers.data.tokenize import load_tokenizer
from threetowers.data.transforms import ImageSpec
for _ in range(2):  # the index is made, and then loaded
    source = open_source(sys.argv[1])
    for i in range(len(source)):
        source.image(i)
workers = int(sys.argv[2])
reader = BatchReader(source, Order(0, len(source), 8), load_tokenizer("open_clip", 8),
                     InputConfig(workers=workers), image=ImageSpec(8, (0.5,) * 3, (0.5,) * 3, "bilinear"))
print(sum(len(batch.index) for batch in batches(reader, 0, len(source) // 8 * 2)))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_more_shards_than_files_may_be_open(workers: int, tmp_path: Path) -> None:
    samples = (ShardSample(f"{i:04d}", picture(i), "png", (f"thing {i}",)) for i in range(96))
    for path in write_shards(tmp_path / "set", samples, shard_size=1):
        os.utime(path, (time.time() - 3600,) * 2)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "set"), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "192", result.stdout + result.stderr


# --- equal images


def one_sample_per_caption(folder: Path, num_images: int = 40) -> Path:
    """As img2dataset writes COCO: every image under five keys."""
    samples = (
        ShardSample(f"{5 * i + k:05d}", picture(i), "png", (f"thing {i} {k}",))
        for k in range(5)
        for i in range(num_images)
    )
    write_shards(folder, samples, shard_size=30)
    return folder


def test_equal_images_of_many_shards_stay_in_one_part(tmp_path: Path) -> None:
    path = str(one_sample_per_caption(tmp_path / "set"))
    assert "160 samples repeat the image of another" in describe(open_source(path))
    parts = splits(path, val_fraction=0.2, test_fraction=0.2)
    images = [{part.image(i) for i in range(len(part))} for part in parts]
    assert sum(map(len, parts)) == 200 and sum(map(len, images)) == 40 and all(images)
    seeded = splits(path, val_fraction=0.2, test_fraction=0.2, seed=3)
    images = [{part.image(i) for i in range(len(part))} for part in seeded]
    assert sum(map(len, images)) == 40


def test_sound_samples_stay_in_their_part_when_copies_come(tmp_path: Path) -> None:
    single = [ShardSample(f"{i:03d}", picture(i), "png", (f"thing {i}",)) for i in range(60)]
    write_shards(tmp_path / "a" / "set", single)
    write_shards(tmp_path / "b" / "set", [*single, ShardSample("copy", picture(7), "png", ("again",))])
    before, after = (
        splits(str(tmp_path / name / "set"), val_fraction=0.3, test_fraction=0.3) for name in "ab"
    )
    for part, other in zip(before, after, strict=True):
        ids = set(captions(other))
        assert set(captions(part)) == ids - {"00000/copy"}
        assert ("00000/007" in ids) == ("00000/copy" in ids)


def test_images_that_differ_in_few_bytes_are_different(tmp_path: Path) -> None:
    """Size and middle are equal, so that only the whole content tells."""
    files = []
    for value in range(4):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[0, 0] = value
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "BMP")
        files.append(buffer.getvalue())
    members: dict[str, bytes] = {}
    for i, data in enumerate([*files, files[0]]):
        members |= {f"{i}.bmp": data, f"{i}.txt": b"words"}
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert [source.record(i).image_id for i in range(5)] == ["", "", "", "", "set/0"]


# --- names


def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        members |= {f"day/DSC.{i:04d}.JPG": picture(i), f"day/DSC.{i:04d}.txt": f"thing {i}".encode()}
        members |= {f"v1.5/{i}.png": picture(50 + i), f"v1.5/{i}.txt": b"plain"}
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert len(source) == 80 and not source.problems
    assert captions(source)["set/day/DSC.0007"] == ("thing 7",)


def test_further_files_of_a_sample_are_no_samples(tmp_path: Path) -> None:
    """webdataset's rule: `0001.seg.png` belongs to 0001."""
    members = {
        "1.jpg": picture(1, "JPEG"),
        "1.txt": b"one",
        "1.seg.png": picture(2),
        "1.meta.json": b'{"w": 6}',
    }
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert captions(source) == {"set/1": ("one",)} and not source.problems
    assert source.image(0) == picture(1, "JPEG")


def test_every_lost_sample_is_a_problem_with_a_short_message(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.txt": b"words"}
    members |= {f"DSC.{i:04d}.jpg": picture(i, "JPEG") for i in range(30)}
    members |= {f"b.part{i}": b"x" for i in range(300)}
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert reasons(source) == {"no caption": 30, "no image": 1}
    assert "and 292 more" in problems(source)["set/b"]
    assert max(map(len, problems(source).values())) < 200


def test_of_two_images_the_one_that_open_clip_reads_is_used(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= {f"{i}.png": picture(9), f"{i}.jpg": picture(i, "JPEG"), f"{i}.txt": b"words"}
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert [source.image(i) for i in range(4)] == [picture(i, "JPEG") for i in range(4)]
    assert problems(source)["set/0"] == "set/0: further image (jpg is used; has png, jpg, txt)"
    check_problems([source], limit=0.0)


# --- captions


def test_the_caption_beside_the_image_comes_before_the_one_in_the_json(tmp_path: Path) -> None:
    def both(key: str, text: str, document: object) -> dict[str, bytes]:
        return {
            f"{key}.png": picture(int(key)),
            f"{key}.txt": text.encode(),
            f"{key}.json": json.dumps(document).encode(),
        }

    members = both("1", "new words", {"caption": "old words"})
    members |= both("2", "same", {"caption": " same "})
    members |= both("3", "first", {"captions": ["first", "second"]})
    members |= both("4", "two\nlines", {"caption": "two\nlines"})
    members |= both("5", "", {"caption": "from the json"})
    source = open_source(str(tar(tmp_path / "set.tar", members)))
    assert captions(source) == {
        "set/1": ("new words",),
        "set/2": ("same",),
        "set/3": ("first", "second"),
        "set/4": ("two lines",),
        "set/5": ("from the json",),
    }
    assert [(problem.id, problem.reason) for problem in source.problems] == [("set/1", "captions differ")]
    check_problems([source], limit=0.0)


def test_captions_under_another_key_of_the_json(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(3):
        document = {"url": "x", "blip2": f"thing {i}", "llava": ["long", "longer"]}
        members |= {f"{i}.png": picture(i), f"{i}.json": json.dumps(document).encode()}
    path = str(tar(tmp_path / "set.tar", members))
    with pytest.raises(
        DataError, match=r"its json has url, blip2, llava; name one with --inputs.caption-columns"
    ):
        open_source(path)
    assert captions(open_source(path, caption_columns=("blip2",)))["set/1"] == ("thing 1",)
    assert captions(open_source(path, caption_columns=("blip2", "llava")))["set/1"] == (
        "thing 1",
        "long",
        "longer",
    )
    with pytest.raises(UsageError, match="no column `blip`: no sample's json has a text under that key"):
        open_source(path, caption_columns=("blip",))
    with pytest.raises(UsageError, match="shards have no columns, so image_column"):
        open_source(path, image_column="png")


# --- places


def test_shards_in_subfolders_and_with_other_endings(tmp_path: Path) -> None:
    for number, name in enumerate(("a/00000.tar", "a/00001.TAR", "b/deep/00000.tar")):
        tar(tmp_path / "set" / name, {"1.png": picture(number), "1.txt": b"words"})
    (tmp_path / "set" / "readme.txt").write_text("a set")
    source = open_source(str(tmp_path / "set"))
    assert sorted(captions(source)) == ["a/00000/1", "a/00001/1", "b/deep/00000/1"]
    assert len(open_source(str(tmp_path / "set" / "a" / "00001.TAR"))) == 1
    assert len(open_source(str(tmp_path / "set" / "a" / "{00000.tar,00001.TAR}"))) == 2


def test_folders_of_parts_are_no_subfolders_of_one_set(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        tar(tmp_path / name / "00000.tar", {"1.png": picture(number), "1.txt": name.encode()})
    assert [captions(part)[next(iter(captions(part)))] for part in splits(str(tmp_path))] == [
        ("train",), ("val",), ("test",)
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "TAR.GZ"])
def test_compressed_shards_are_named_with_the_command_that_unpacks_them(ending: str, tmp_path: Path) -> None:
    plain = tar(tmp_path / "x" / "00000.tar", {"1.png": picture(0), "1.txt": b"words"})
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / f"00000.{ending}").write_bytes(gzip.compress(plain.read_bytes()))
    for path in (folder, folder / f"00000.{ending}"):
        with pytest.raises(
            DataError, match=rf"00000.{ending}: 1 shard is compressed.*gunzip .*00000.{ending}"
        ):
            open_source(str(path))
    (folder / "00000.tar").write_bytes(plain.read_bytes())
    assert len(open_source(str(folder))) == 1, "unpacked beside it"
    (folder / "00001.tgz").write_bytes(b"")
    with pytest.raises(DataError, match=r"00001.tgz: 1 shard is compressed"):
        open_source(str(folder))
