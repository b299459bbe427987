"""Equal and near-equal images and captions: in evaluation, in mixes, and between training and test data."""

import io
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from kit.runs import Config
from threetowers.commands import validate
from threetowers.data import copies
from threetowers.data.open import open_source, splits
from threetowers.data.overlap import (
    SIMILAR,
    near_copies,
    normalised,
    shared_captions,
    shared_images,
    thumbnail,
)
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import Source, Subset, check_problems, describe
from threetowers.errors import BadSample, DataError
from threetowers.evaluate.encode import encode
from threetowers.run.setup import assemble, open_data


def picture(seed: int, size: int = 24) -> Image.Image:
    """A scene of a few shapes, which looks alike at any size."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(generator.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = (generator.uniform(0, 0.7, 4) * size).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=tuple(generator.integers(0, 255, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder_of(folder: Path, files: dict[str, tuple[bytes, str]]) -> str:
    folder.mkdir(parents=True)
    for name, (data, caption) in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(caption)
    return str(folder)


def image_ids(source: Source) -> list[str]:
    return [source.record(i).image_id for i in range(len(source))]


def test_copies_are_right_answers_in_evaluation(tmp_path: Path, tiny_config: Config) -> None:
    """Three samples an image are encoded as one image with three captions, each of which finds it."""
    files = {f"{i}-{k}.png": (encoded(picture(i)), f"thing {i} {k}") for i in range(8) for k in range(3)}
    path = folder_of(tmp_path / "photos", files)
    config = tiny_config(data=path, batch_size=2)
    setup = assemble(config, tmp_path / "run")
    source = open_source(path)
    merged = encode(setup.model, source, setup.tokenizer, {}, torch.device("cpu"))
    assert len(merged.index) == 8 and len(merged.captions) == 24
    assert merged.text_image.bincount().tolist() == [3] * 8
    for row, index in enumerate(merged.index.tolist()):
        own = {merged.captions[i] for i in (merged.text_image == row).nonzero().flatten().tolist()}
        assert own == {f"thing {source.record(index).id[0]} {k}" for k in range(3)}
    apart = encode(setup.model, source, setup.tokenizer, {}, torch.device("cpu"), merge=False)
    assert len(apart.index) == 24
    torch.testing.assert_close(apart.views["img"][::3], merged.views["img"])


def test_a_batch_knows_equal_images(tmp_path: Path, tiny_config: Config) -> None:
    files = {f"{i}.png": (encoded(picture(i % 5)), f"thing {i}") for i in range(20)}
    config = tiny_config(data=folder_of(tmp_path / "photos", files), batch_size=6)
    setup = assemble(config, tmp_path / "run")
    batch = setup.reader()[range(6)]
    contents = [setup.train.image(i) for i in batch.index.tolist()]
    equal = [[a == b for b in contents] for a in contents]
    assert (batch.image_ids[:, None] == batch.image_ids).tolist() == equal


def test_a_mix_finds_equal_images_of_different_formats(tmp_path: Path) -> None:
    """What one source tests on is in no training part, whatever the other source calls it."""
    files = [encoded(picture(i)) for i in range(60)]
    folder_of(tmp_path / "photos", {f"{i}.png": (data, f"thing {i}") for i, data in enumerate(files)})
    samples = [ShardSample(f"s{i}", data, "png", (f"shard {i}",)) for i, data in enumerate(files[20:])]
    write_shards(tmp_path / "shards", samples)
    mix = tmp_path / "mix.toml"
    mix.write_text('[[source]]\npath = "photos"\n[[source]]\npath = "shards"\nweight = 2\n')
    parts = splits(str(mix), val_fraction=0.2, test_fraction=0.2)
    images = [{part.image(i) for i in range(len(part))} for part in parts]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert set().union(*images) == set(files)
    assert "left out, since another source validates or tests on their images" in parts[0].layout
    whole = open_source(str(mix))
    assert len({record.image_id for record in map(whole.record, range(len(whole)))}) == 60
    assert "40 samples repeat the image of another" in describe(whole)


def test_comparisons_of_many_files_are_remembered_until_one_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("threetowers.data.formats.files.REMEMBERED_FROM", 3)
    path = folder_of(
        tmp_path / "p", {f"{i}.bmp": (encoded(picture(i % 3), "BMP"), f"thing {i}") for i in range(9)}
    )
    calls: list[int] = []
    real = copies.find_copies

    def counted(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("threetowers.data.formats.files.find_copies", counted)
    first = image_ids(open_source(path))
    assert first == image_ids(open_source(path)) == ["", "", "", *["0.bmp", "1.bmp", "2.bmp"] * 2]
    assert len(calls) == 1
    (tmp_path / "p" / "3.bmp").write_bytes(encoded(picture(2), "BMP"))
    assert image_ids(open_source(path))[3] == "2.bmp" and len(calls) == 2


# --- shares of problems


def test_a_bad_sample_counts_once_and_against_all_parts(tmp_path: Path, tiny_config: Config) -> None:
    """One of 500 is 0.2 %, whichever part it falls into."""
    files = {f"{i:03d}.png": (encoded(picture(i, 8)), f"thing {i}") for i in range(200)}
    whole = open_source(folder_of(tmp_path / "photos", files))
    for number, part in enumerate(splits(str(tmp_path / "photos"))):
        one = part.record(0).id
        path = folder_of(tmp_path / f"bad-{number}", files | {one: (files[one][0], "")})
        assert sum(map(len, open_data(tiny_config(data=path)))) == 199
    bad = [BadSample(f"{i:03d}.png", "caption is not UTF-8") for i in range(52)]
    part = Subset(whole, whole_indices(52), "some", [*bad, *bad])
    with pytest.raises(DataError, match="52 of 52 samples have problems"):
        check_problems([part])
    check_problems([Subset(whole, whole_indices(100), "some", [BadSample("x", "no image")])], limit=0.01)
    with pytest.raises(DataError, match="1 of 11 samples have problems"):
        check_problems([Subset(whole, whole_indices(10), "some", [BadSample("x", "no image")])], limit=0.01)


def whole_indices(count: int) -> "array[int]":
    return array("q", range(count))


# --- what training and test data share


def test_shared_captions_are_found_apart_from_case_and_punctuation(tmp_path: Path) -> None:
    train = open_source(
        folder_of(tmp_path / "a", {f"{i}.png": (encoded(picture(i)), f"A thing, {i}!") for i in range(4)})
    )
    test = open_source(
        folder_of(tmp_path / "b", {f"{i}.png": (encoded(picture(9 + i)), f"a THING {i}") for i in range(8)})
    )
    assert shared_captions(train, test) == 0.5
    assert shared_captions(test, train) == 1.0
    assert normalised("...") == "..." and normalised("Ä–b, C") == "ä b c"


def test_thumbnails_tell_near_equal_images_from_different_ones() -> None:
    images = [picture(i, 96) for i in range(100)]
    rows = np.stack([row for image in images if (row := thumbnail(image)) is not None])
    assert len(rows) == len(images)
    for size, quality in ((96, 30), (48, 60)):
        files = [encoded(image.resize((size, size)), "JPEG", quality=quality) for image in images]
        small = [thumbnail(Image.open(io.BytesIO(file))) for file in files]
        others = np.stack([row for row in small if row is not None])
        assert (rows * others).sum(1).min() > SIMILAR
    different = rows @ rows.T
    np.fill_diagonal(different, -1)
    assert different.max() < SIMILAR - 0.05


def test_validate_says_what_test_data_share_with_training_data(tmp_path: Path, tiny_config: Config) -> None:
    """Parts that come with the data: equal captions, equal images, and on request the same image at another size."""
    train = {f"{i}.png": (encoded(picture(i, 48)), f"thing {i}") for i in range(24)}
    test = {
        "same.png": (encoded(picture(3, 48)), "Thing 3"),
        "small.jpg": (encoded(picture(5, 48).resize((40, 40)), "JPEG", quality=80), "other words"),
        **{f"{i}.png": (encoded(picture(i, 48)), f"thing {i}") for i in range(50, 58)},
    }
    val = {f"{i}.png": (encoded(picture(i, 48)), f"thing {i}") for i in range(70, 74)}
    for name, files in (("train", train), ("val", val), ("test", test)):
        folder_of(tmp_path / "photos" / name, files)
    parts = splits(str(tmp_path / "photos"))
    assert shared_images(parts[0], parts[2]) == 1
    assert [(pair.test, pair.train) for pair in near_copies(parts[0], parts[2])] == [
        ("same.png", "3.png"),
        ("small.jpg", "5.png"),
    ]
    config = tiny_config(data=str(tmp_path / "photos"), batch_size=8)
    text = "\n".join(validate.validate(replace(config, steps=1), tmp_path / "run", near=True))
    assert "test captions: 10.0% are training captions too" in text
    assert "note: 1 of 10 test samples have the image of a training sample" in text
    assert "near-equal images: 2 of 10 test images look like a training image" in text
