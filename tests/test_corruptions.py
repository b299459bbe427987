"""Corrupted images: graded, repeatable, meaningful at every size, and sources like any other."""

import itertools
import pickle
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kit.pictures import encoded, noise, picture
from kit.runs import Config
from kit.sources import assert_is_a_source, content
from kit.towers import image_tower
from threetowers.data.copies import middle_key
from threetowers.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSource, Corruption, corrupt
from threetowers.data.decode import decode
from threetowers.data.open import open_source, split
from threetowers.data.source import Source, Subset
from threetowers.errors import BadSample, UsageError
from threetowers.evaluate.encode import encode
from threetowers.run.setup import assemble
from threetowers.store.embed import find_or_make_store
from threetowers.world.pictures import render

NAMES = tuple(corruption.name for corruption in CORRUPTIONS)
DRAWN = ("noise", "occlusion")
"""What the seed is for."""
every_corruption = pytest.mark.parametrize("name", NAMES)


def scenes(size: int, num: int = 12) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in render(0, np.arange(num), size=size, split="test")]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def error(image: Image.Image, name: str, severity: int, seed: int = 0) -> float:
    """The mean squared error of a corruption, in squared grey levels."""
    return float(((levels(corrupt(image, name, severity, seed)) - levels(image)) ** 2).mean())


def strength(name: str, severity: int) -> float:
    return next(each for each in CORRUPTIONS if each.name == name).strengths[severity - 1]


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@every_corruption
def test_severity_increases_distortion(name: str, size: int) -> None:
    pictures = scenes(size)
    errors = [
        np.mean([error(p, name, severity, i) for i, p in enumerate(pictures)]) for severity in SEVERITIES
    ]
    assert all(low * 1.04 < high for low, high in itertools.pairwise(errors)), errors
    assert errors[0] > 5, "the weakest can be seen"
    assert errors[0] < 0.75 * errors[-1] and errors[-1] > 200, "the strongest is strong"


@every_corruption
@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    severity=st.sampled_from(SEVERITIES),
    seed=st.integers(0, 2**64 - 1),
)
def test_an_image_of_any_shape_keeps_its_size_and_has_the_same_pixels_again(
    name: str, width: int, height: int, severity: int, seed: int
) -> None:
    image = noise(width, height)
    before = image.tobytes()
    corrupted = corrupt(image, name, severity, seed)
    assert (corrupted.mode, corrupted.size) == ("RGB", (width, height))
    assert corrupted.tobytes() == corrupt(image.copy(), name, severity, seed).tobytes()
    assert image.tobytes() == before, "the given image stays as it is"


@every_corruption
def test_the_seed_decides_what_is_drawn_and_nothing_else(name: str) -> None:
    image = scenes(64)[0]
    results = {corrupt(image, name, 3, seed).tobytes() for seed in range(8)}
    assert (len(results) > 1) == (name in DRAWN)


def test_noise_has_the_stated_deviation_and_no_mean() -> None:
    grey = Image.new("RGB", (128, 96), (128, 128, 128))
    for severity in (1, 2, 3):  # stronger noise is clipped at black and white
        pixels = levels(corrupt(grey, "noise", severity, 5)) - 128
        assert pixels.std() == pytest.approx(255 * strength("noise", severity), rel=0.02)
        assert abs(pixels.mean()) < 0.8
        channels = np.corrcoef(pixels.reshape(-1, 3).T)
        assert abs(channels - np.eye(3)).max() < 0.05, "each channel has its own"
    white = levels(corrupt(Image.new("RGB", (128, 96), "white"), "noise", 2, 5))
    half_normal = 255 * strength("noise", 2) / np.sqrt(2 * np.pi)  # what lies above white is cut off
    assert 255 - white.mean() == pytest.approx(half_normal, rel=0.03)


def test_noise_of_large_images_has_grains_that_survive_scaling() -> None:
    """An image of 1,120 px has grains of 5 px: scaled to 224 px, it is as noisy as one of 224 px."""
    deviations = []
    for size in (224, 1_120):
        noisy = corrupt(Image.new("RGB", (size, size), (128, 128, 128)), "noise", 2, 1)
        deviations.append(levels(noisy.resize((224, 224), Image.Resampling.BOX)).std())
    assert deviations[1] == pytest.approx(deviations[0], rel=0.02)


def test_contrast_equals_the_plain_reference() -> None:
    image = noise(9, 7, seed=3)
    for severity in SEVERITIES:
        pixels, share = levels(image), strength("contrast", severity)
        mean = pixels.mean(axis=(0, 1), keepdims=True)
        expected = mean + share * (pixels - mean)
        assert abs(levels(corrupt(image, "contrast", severity, 0)) - expected).max() <= 0.51


def test_pixels_are_those_of_the_stated_number_of_cells() -> None:
    for severity in SEVERITIES:
        cells = int(strength("pixelate", severity))
        pixels = levels(corrupt(noise(130, 260), "pixelate", severity, 0))
        rows = 1 + (pixels[1:] != pixels[:-1]).any(axis=(1, 2)).sum()
        columns = 1 + (pixels[:, 1:] != pixels[:, :-1]).any(axis=(0, 2)).sum()
        assert (columns, rows) == (cells, 2 * cells)
    small = noise(10, 40)
    assert corrupt(small, "pixelate", 5, 0).tobytes() == small.tobytes(), (
        "an image has no more cells than pixels"
    )


def test_a_stronger_occlusion_covers_what_a_weaker_one_covers() -> None:
    image = Image.new("RGB", (100, 60), "white")
    for seed in range(20):
        covered = [(levels(corrupt(image, "occlusion", s, seed)) == 128).all(axis=2) for s in SEVERITIES]
        for severity, mask in zip(SEVERITIES, covered, strict=True):
            assert mask.sum() == round(60 * strength("occlusion", severity)) ** 2
            assert mask.any(axis=0).sum() == mask.any(axis=1).sum(), "it is a square, and whole"
        assert all((weak & ~strong).sum() == 0 for weak, strong in itertools.pairwise(covered))


def test_blur_is_that_of_a_gaussian_of_the_stated_width() -> None:
    """A white line's variance, per channel, in an image of 200 px."""
    pixels = np.zeros((200, 201, 3), np.uint8)
    pixels[:, 100] = 255
    place = np.arange(201) - 100
    for severity in (3, 4, 5):  # the faintest tails are below a grey level
        row = levels(corrupt(Image.fromarray(pixels), "blur", severity, 0))[100, :, 0]
        deviation = np.sqrt((row * place**2).sum() / row.sum())
        assert deviation == pytest.approx(200 * strength("blur", severity), rel=0.12)


def test_jpeg_is_that_of_the_stated_quality() -> None:
    image = scenes(64)[1]
    for severity in SEVERITIES:
        quality = int(strength("jpeg", severity))
        expected = decode(encoded(image, "JPEG", quality=quality), "")
        assert corrupt(image, "jpeg", severity, 0).tobytes() == expected.tobytes()


def test_the_table_is_complete() -> None:
    assert NAMES == ("noise", "blur", "contrast", "jpeg", "pixelate", "occlusion")
    for corruption in CORRUPTIONS:
        assert isinstance(corruption, Corruption) and corruption.unit
        assert len(set(corruption.strengths)) == len(SEVERITIES)
        assert list(corruption.strengths) in (
            sorted(corruption.strengths),
            sorted(corruption.strengths)[::-1],
        )


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("fog", 1, "there is no 'fog'. Give one of noise, blur"),
        ("blur", 0, "0 is not one"),
        ("blur", 6, "6 is not"),
    ],
)
def test_unknown_corruptions_and_severities_are_usage_errors(
    name: str, severity: int, message: str, photos: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        corrupt(noise(3, 3), name, severity, 0)
    with pytest.raises(UsageError, match=message):
        CorruptedSource(open_source(str(photos)), name, severity)


# What is a source: the contract of test_source_contract.py, and what is stored of it.


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Six captioned pictures, the last of which is the first once more under another name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number % 5))
        (folder / f"{number}.txt").write_text(f"thing {number}\nother")
    return open_source(str(folder))


@every_corruption
def test_a_corrupted_source_keeps_the_contract_of_sources(name: str, source: Source) -> None:
    corrupted = CorruptedSource(source, name, 4, seed=2)
    assert_is_a_source(corrupted)
    assert [corrupted.record(i) for i in range(6)] == [source.record(i) for i in range(6)]
    copy = pickle.loads(pickle.dumps(corrupted))
    assert copy.name == corrupted.name != source.name and copy.layout == corrupted.layout
    sizes = [len(image) for _, image in content(corrupted)]
    assert copy.image_sizes().tolist() == corrupted.image_sizes().tolist() == sizes
    backwards = np.arange(6)[::-1]
    middles = [middle_key(corrupted.image(i)) for i in backwards]
    assert copy.image_middles(backwards).tolist() == corrupted.image_middles(backwards).tolist() == middles
    parts = split(corrupted, val_fraction=0.3, test_fraction=0.0, seed=1)
    assert sum(map(len, parts)) == 6
    for i in range(6):
        before, after = (decode(each.image(i), "") for each in (source, corrupted))
        assert before.size == after.size


@every_corruption
def test_what_is_drawn_depends_on_the_image_alone(name: str, source: Source) -> None:
    """Not on its number; equal images stay equal, so that they count once as before."""
    corrupted = CorruptedSource(source, name, 3)
    assert corrupted.image(5) == corrupted.image(0)
    some = CorruptedSource(Subset(source, array("q", [3, 1, 5]), "some"), name, 3)
    assert [some.image(i) for i in range(3)] == [corrupted.image(i) for i in (3, 1, 5)]


def test_other_images_have_other_noise(tmp_path: Path) -> None:
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    for number in range(2):
        grey.putpixel((0, 0), (number, 0, 0))
        grey.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("grey")
    corrupted = CorruptedSource(open_source(str(tmp_path)), "noise", 3)
    first, second = (levels(decode(corrupted.image(i), ""))[1:] for i in range(2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3


def test_the_fingerprint_changes_with_all_that_changes_pixels(source: Source) -> None:
    made = [
        CorruptedSource(source, "noise", 3), CorruptedSource(source, "noise", 4), CorruptedSource(source, "blur", 3),
        CorruptedSource(source, "noise", 3, seed=1),
        CorruptedSource(Subset(source, array("q", [0, 1]), "some"), "noise", 3),
        source,
    ]  # fmt: skip
    assert len({each.fingerprint for each in made}) == len(made)
    assert CorruptedSource(source, "noise", 3).fingerprint == made[0].fingerprint


def test_an_image_that_cannot_be_decoded_is_a_bad_sample(source: Source, tmp_path: Path) -> None:
    (tmp_path / "photos" / "2.png").write_bytes(b"<html>")
    corrupted = CorruptedSource(source, "blur", 1)
    with pytest.raises(BadSample, match=r"2\.png: not an image"):
        corrupted.image(2)
    assert corrupted.image_sizes()[2] == 0 and (corrupted.image_sizes() > 0).sum() == 5


def test_evaluation_and_stores_take_a_corrupted_source_as_any_other(
    source: Source, timm_tower: str, tiny_config: Config, tmp_path: Path
) -> None:
    corrupted = CorruptedSource(source, "contrast", 5)
    setup = assemble(tiny_config(), tmp_path / "run")
    device = torch.device("cpu")
    clean, worse = (
        encode(setup.model, each, setup.tokenizer, {}, device, workers=workers)
        for each, workers in ((source, 0), (corrupted, 2))
    )
    assert clean.captions == worse.captions and torch.equal(clean.views["txt"], worse.views["txt"])
    assert clean.index.tolist() == worse.index.tolist() == [0, 1, 2, 3, 4]
    assert not torch.allclose(clean.views["img"], worse.views["img"], atol=1e-3)
    tower = image_tower(timm_tower)
    stores = [
        find_or_make_store(tower, each, tmp_path / "stores", device)
        for each in (source, corrupted, corrupted)
    ]
    rows = [store.rows(np.arange(6)) for store in stores]
    assert len(list((tmp_path / "stores").iterdir())) == 2
    assert torch.equal(rows[1], rows[2]) and not torch.allclose(rows[0], rows[1], atol=1e-2)
