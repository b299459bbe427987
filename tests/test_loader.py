"""Batches are a function of positions alone, and what cannot be read is replaced and named."""

import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from kit.batches import SPEC, reader
from threetowers.config import InputConfig
from threetowers.data.loader import Batch, BatchReader, augmented_views, batches
from threetowers.data.open import open_source
from threetowers.data.transforms import ImageSpec, cropped_view, normalise, random_crop
from threetowers.errors import DataError


def pixels(batch: Batch) -> Tensor:
    assert batch.pixels is not None
    return batch.pixels


def test_a_batch_depends_on_its_positions_alone(photos: Path) -> None:
    one, other = reader(photos), reader(photos)
    positions = [range(8 * k, 8 * k + 8) for k in range(30)]
    forward = [one[p] for p in positions]
    backward = [other[p] for p in reversed(positions)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert (
            torch.equal(pixels(a), pixels(b))
            and torch.equal(a.tokens, b.tokens)
            and torch.equal(a.index, b.index)
        )
    with_workers = list(batches(reader(photos, workers=2), 0, 30))
    assert all(torch.equal(pixels(a), pixels(b)) for a, b in zip(forward, with_workers, strict=True))
    first, second = forward[:12], forward[12:24]
    assert not torch.equal(torch.cat([pixels(b) for b in first]), torch.cat([pixels(b) for b in second])), (
        "epochs differ"
    )


class Stored:
    """Features of the captions of 96 samples, 5 numbers each that are the sample's index."""

    usable = np.ones(96, dtype=bool)
    side, num_views = "text", 0

    def rows(self, samples: np.ndarray, which: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(samples)[:, None].expand(-1, 5).float()


def test_stored_features_and_pixels_for_live_towers_are_apart(photos: Path) -> None:
    one = reader(photos, live={"third_a": replace(SPEC, size=16)}, stores={"third_b": Stored()})
    batch = one[range(8)]
    assert (set(batch.third_pixels), set(batch.third_features)) == ({"third_a"}, {"third_b"})
    for part, num in ((batch, 8), (batch.part(2, 5), 3), (batch.to(torch.device("cpu")), 8)):
        assert part.pixels is not None
        assert (part.third_pixels["third_a"].shape, part.third_pixels["third_a"].dtype) == (
            (num, 3, 16, 16), torch.uint8,
        )  # fmt: skip
        assert torch.equal(part.third_features["third_b"][:, 0], part.index.float())


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_sees_the_same_samples_for_three_epochs(workers: int, photos: Path) -> None:
    one = reader(photos)
    epochs = 3 * len(one.source) // 8
    expected = [one[range(8 * k, 8 * k + 8)].index.tolist() for k in range(epochs)]
    found = [batch.index.tolist() for batch in batches(reader(photos, workers=workers), 0, epochs)]
    assert found == expected
    assert sorted(index for batch in expected[:12] for index in batch) == list(range(96)), (
        "an epoch is every sample once"
    )


def test_two_processes_read_halves_that_make_the_batch(photos: Path) -> None:
    one = reader(photos)
    steps = 3 * len(one.source) // 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        shares = [[range(8 * k + 4 * half, 8 * k + 4 * half + 4) for k in range(steps)] for half in (0, 1)]
        halves = [
            [(batch.index.tolist(), pixels(batch)) for batch in share]
            for share in pool.map(partial(read_all, one), shares)
        ]
    for k, (first, second) in enumerate(zip(*halves, strict=True)):
        whole = one[range(8 * k, 8 * k + 8)]
        assert first[0] + second[0] == whole.index.tolist()
        assert torch.equal(torch.cat([first[1], second[1]]), pixels(whole))


def read_all(one: BatchReader, positions: list[range]) -> list[Batch]:
    return [one[part] for part in positions]


def test_every_caption_of_an_image_is_used_over_the_epochs(photos: Path) -> None:
    one = reader(photos)
    seen: dict[int, set[tuple[int, ...]]] = {}
    for k in range(12 * 8):
        batch = one[range(8 * k, 8 * k + 8)]
        for index, caption in zip(batch.index.tolist(), batch.caption_ids.tolist(), strict=True):
            seen.setdefault(index, set()).add(caption)
    assert np.mean([len(captions) for captions in seen.values()]) > 1.9


def test_text_is_cut_to_the_longest_caption_of_the_batch(photos: Path) -> None:
    batch = reader(photos)[range(8)]
    assert batch.tokens.shape[1] < 16
    assert (batch.tokens == 2).any(dim=1).all(), "every caption keeps its end token"


def test_a_bad_image_is_replaced_and_nothing_after_it_shifts(photos: Path, tmp_path: Path) -> None:
    good = reader(photos)
    for name in sorted(photos.parent.iterdir()):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    (tmp_path / "007.png").write_bytes(b"<html>not an image</html>")
    bad = reader(tmp_path / photos.name)
    named = []
    for k in range(24):
        expected, got = good[range(8 * k, 8 * k + 8)], bad[range(8 * k, 8 * k + 8)]
        same = expected.index == got.index
        named += got.bad
        assert torch.equal(pixels(expected)[same], pixels(got)[same])
        assert (expected.index[~same] == 7).all() and len(expected.index) == len(got.index)
    assert {(problem.id, problem.reason) for problem in named} == {("007.png", "not an image")}
    assert len(named) == 2, "once in each of two epochs"


def test_a_source_without_one_readable_image_ends_with_an_error(photos: Path, tmp_path: Path) -> None:
    for name in photos.parent.iterdir():
        (tmp_path / name.name).write_bytes(b"" if name.suffix == ".png" else name.read_bytes())
    with pytest.raises(DataError, match="100 samples in a row"):
        reader(tmp_path / photos.name)[range(8)]


@given(st.integers(0, 2**63), st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=200)
def test_crops_stay_inside_and_follow_the_seed(seed: int, width: int, height: int) -> None:
    crop = random_crop(seed, (width, height), (0.2, 0.9), (0.5, 2.0), True)
    left, top, right, bottom = crop.box
    assert 0 <= left < right <= 1 + 1e-9 and 0 <= top < bottom <= 1 + 1e-9
    assert crop == random_crop(seed, (width, height), (0.2, 0.9), (0.5, 2.0), True)
    area = (right - left) * (bottom - top)
    assert area <= 0.9 + 1e-9


def test_crops_spread_over_area_place_and_flip() -> None:
    crops = [random_crop(seed, (100, 100), (0.2, 1.0), (1.0, 1.0), True) for seed in range(2000)]
    areas = [(c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in crops]
    assert 0.58 < np.mean(areas) < 0.62 and min(areas) < 0.21 and max(areas) > 0.99
    assert 0.46 < np.mean([c.flip for c in crops]) < 0.54


def test_a_crop_of_everything_is_the_image_resized() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    crop = random_crop(1, image.size, (1.0, 1.0), (1.0, 1.0), False)
    assert np.array_equal(cropped_view(np.asarray(image), crop, SPEC), np.asarray(image).transpose(2, 0, 1))


@given(st.integers(0, 2**63), st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans())
@settings(max_examples=100, deadline=None)
def test_crops_are_those_of_pillow_to_two_grey_levels(
    seed: int, width: int, height: int, target: int, bilinear: bool
) -> None:
    spec = replace(SPEC, size=target, interpolation="bilinear" if bilinear else "bicubic")
    image = Image.fromarray(np.random.default_rng(seed).integers(64, 192, (height, width, 3), dtype=np.uint8))
    crop = random_crop(seed, image.size, (0.3, 1.0), (0.5, 2.0), True)
    left, top, across, down = crop.pixels(image.size)
    assert left >= 0 and left + across <= width and top >= 0 and top + down <= height
    kernel = Image.Resampling[spec.interpolation.upper()]
    resized = image.crop((left, top, left + across, top + down)).resize((target, target), kernel)
    expected = np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else resized)
    ours = cropped_view(np.asarray(image), crop, spec)
    assert ours.shape == (3, target, target) and ours.dtype == np.uint8
    # levels from 64 to 191: where bicubic overshoots black or white, the two clip it between different passes
    assert np.abs(ours.astype(int) - expected.transpose(2, 0, 1)).max() <= 2


def test_pixels_are_normalised_per_channel() -> None:
    spec = ImageSpec(2, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert normalise(pixels, spec)[0, :, 0, 0].tolist() == pytest.approx([1.8, 3.2, 5.6])


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_draft_changes_large_jpegs_slightly_and_others_not_at_all(decoder: str, tmp_path: Path) -> None:
    rng, spec = np.random.default_rng(0), replace(SPEC, size=96)
    for name, side in (("small", 120), ("large", 480)):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.jpg", quality=90)
        (tmp_path / f"{name}.txt").write_text("a picture")
    source = open_source(str(tmp_path))
    plain = InputConfig(crop_scale=(0.9, 1.0))
    draft = replace(plain, draft=True, decoder=decoder)  # type: ignore[arg-type]
    for index in range(len(source)):
        id = source.record(index).id
        for seed in range(5):
            whole, small = (
                augmented_views(source, index, id, seed, inputs, {"img": spec})["img"].astype(int)
                for inputs in (plain, draft)
            )
            if "small" in id:
                assert np.array_equal(whole, small)
            else:
                assert not np.array_equal(whole, small)
                assert np.abs(whole - small).mean() < 2
