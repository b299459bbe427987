"""The built-in world: the same bytes however it is asked, true captions, clean splits, and folders that are whole."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.files import contents
from threetowers.data.decode import decode
from threetowers.data.shards.source import open_shards
from threetowers.data.shards.write import ShardSample
from threetowers.errors import DataError, UsageError
from threetowers.world import pictures
from threetowers.world import scenes as scene_module
from threetowers.world import write as shapes
from threetowers.world.captions import captions as captions_of
from threetowers.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    SPLITS,
    SYNONYMS,
    TEXTURES,
    Kind,
    Split,
)

CANONICAL = {synonym: word for word, synonym in SYNONYMS.items()}
NOUN = rf"an? ((?:{'|'.join((*SIZES, *COLOURS, *TEXTURES, *CANONICAL))}) )*(?:{'|'.join(SHAPES)})\b"
SMALL: dict[str, Any] = {"num_train": 30, "num_val": 5, "num_test": 6, "num_labelled": 40}


def words_of(scene: scene_module.Scenes, row: int, slot: int) -> set[str]:
    return {
        names[getattr(scene, field)[row, slot]]
        for field, names in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES), ("size", SIZES))
    }


# Determinism


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**62),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    st.sampled_from(KINDS),
    st.sampled_from(SPLITS),
    st.sampled_from([16, 32, 37]),
)
def test_a_scene_is_the_same_alone_in_a_batch_and_in_any_order(
    seed: int, indices: list[int], kind: Kind, split: Split, size: int
) -> None:
    batch = np.array(indices)
    together = pictures.render(seed, batch, kind=kind, split=split, size=size)
    backwards = pictures.render(seed, batch[::-1], kind=kind, split=split, size=size)
    np.testing.assert_array_equal(together, backwards[::-1])
    for row, index in enumerate(indices):
        alone = pictures.render(seed, np.array([index]), kind=kind, split=split, size=size)
        np.testing.assert_array_equal(alone[0], together[row])
        assert (
            captions_of(seed, np.array([index]), split=split)[0]
            == (captions_of(seed, batch, split=split)[row])
        )


def test_batches_longer_than_a_chunk_are_the_same_as_their_parts() -> None:
    whole = pictures.render(3, np.arange(300), size=16)
    parts = [pictures.render(3, np.arange(start, start + 50), size=16) for start in range(0, 300, 50)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_narrow_index_types_give_the_same_scenes() -> None:
    for kind in KINDS:
        wide, narrow = (
            pictures.render(0, np.arange(200).astype(dtype), kind=kind, size=16) for dtype in ("i8", "u1")
        )
        np.testing.assert_array_equal(wide, narrow)


# Splits


def test_seeds_kinds_and_splits_share_no_picture() -> None:
    seen: set[bytes] = set()
    for seed in (0, 1):
        for kind in KINDS:
            for split in SPLITS:
                seen |= {
                    image.tobytes() for image in pictures.render(seed, np.arange(60), kind=kind, split=split)
                }
    assert len(seen) == 2 * len(KINDS) * len(SPLITS) * 60


def holds(scenes: scene_module.Scenes, pairs: tuple[tuple[str, str], ...]) -> Any:
    """[B]: whether any object is one of these pairs of colour and shape."""
    found = [
        (scenes.colour == COLOURS.index(colour)) & (scenes.shape == SHAPES.index(shape))
        for colour, shape in pairs
    ]
    return np.any(found, axis=(0, 2))


def shown(scenes: scene_module.Scenes) -> set[tuple[str, str]]:
    """The pairs of colour and shape in the scenes."""
    numbers = zip(scenes.colour.flat, scenes.shape.flat, strict=True)
    return {(COLOURS[colour], SHAPES[shape]) for colour, shape in numbers if shape >= 0}


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_shows_pairs_that_those_before_it_do_not(kind: Kind) -> None:
    train, val, test = (scene_module.scenes(5, np.arange(20_000), kind=kind, split=split) for split in SPLITS)
    assert len(shown(test)) == 96
    assert shown(test) - shown(val) == set(scene_module.NEW_IN_TEST)
    assert shown(val) - shown(train) == set(scene_module.NEW_IN_VAL)
    every = scene_module.NEW_IN_VAL + scene_module.NEW_IN_TEST
    assert len(every) == 6 and 0.05 < holds(test, every).mean() < 0.14
    assert 0.025 < holds(val, scene_module.NEW_IN_VAL).mean() < 0.07


UNCHANGED = {
    ("pairs", "train"): "fcd3561c83156c57",
    ("pairs", "test"): "f3c0caf72d989e35",
    ("objects", "train"): "117aea22f1b28544",
    ("objects", "test"): "e9c4d4bb50b7b944",
    ("scenes", "train"): "a99b79d0e9352fb6",
    ("scenes", "test"): "6046c044ba78311f",
}
"""Digests of what is in the first scenes of seed 0, with captions. Committed figures are about these scenes."""


@pytest.mark.parametrize(("kind", "split"), UNCHANGED)
def test_training_and_test_scenes_stay_as_they_are(kind: Kind, split: Split) -> None:
    indices = np.arange(500)
    scene = scene_module.scenes(0, indices, kind=kind, split=split)
    content = [getattr(scene, field.name).tolist() for field in fields(scene)]
    told = captions_of(0, indices, split=split) if kind == "pairs" else None
    assert hashlib.sha256(repr((content, told)).encode()).hexdigest()[:16] == UNCHANGED[kind, split]


def test_every_attribute_is_about_equally_frequent() -> None:
    scene = scene_module.scenes(0, np.arange(20_000))
    for name, count in (("shape", 12), ("colour", 8), ("texture", 4), ("size", 2)):
        values = getattr(scene, name)
        share = np.bincount(values[values >= 0], minlength=count) / (values >= 0).sum()
        assert share.min() > 0.87 / count and share.max() < 1.13 / count, name
    assert 0.19 < (scene.layout == 0).mean() < 0.21
    assert (scene.shape[:, 1] < 0).tolist() == (scene.layout == 0).tolist()


def test_test_scenes_are_hardly_ever_described_by_each_other() -> None:
    scene = scene_module.scenes(0, np.arange(1_000), split="test")
    columns = [getattr(scene, field.name).reshape(1_000, -1) for field in fields(scene)]
    assert len(np.unique(np.concatenate(columns, axis=1), axis=0)) > 990


# Captions


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true(split: Split) -> None:
    indices = np.arange(1_500)
    scene = scene_module.scenes(7, indices, split=split)
    complete = 0
    for row, captions in enumerate(captions_of(7, indices, split=split)):
        assert len(set(captions)) == 5
        slots = 1 if scene.layout[row] == 0 else 2
        for k, caption in enumerate(captions):
            nouns = [
                {CANONICAL.get(word, word) for word in match[0].split()[1:]}
                for match in re.finditer(NOUN, caption)
            ]
            first = 0
            assert len(nouns) == slots, caption
            if slots == 2:
                first = int(names_second_place_first(caption, scene.layout[row]))
                nouns = nouns[::-1] if first else nouns
            for slot, noun in enumerate(nouns):
                assert noun <= words_of(scene, row, slot), caption
            assert {word for word in caption.split() if word in BACKGROUNDS} <= {
                BACKGROUNDS[scene.background[row]]
            }
            full = all(len(noun) == 4 for noun in nouns) and any(
                word in BACKGROUNDS for word in caption.split()
            )
            complete += full
            assert full or k > 0, f"the first caption leaves something out: {caption}"
            assert not re.search(r"\ban (?![aeio]|hourglass)|\ba ([aeio]|hourglass)", caption), caption
    assert 0.4 < complete / (5 * len(indices)) < 0.8


def names_second_place_first(caption: str, layout: int) -> bool:
    """Whether the caption's first object is the right or lower one, read from its words alone."""
    if layout == 1:
        assert not re.search(r"\b(above|over|below|under|stacked)\b", caption), caption
        return bool(re.search(r"right of|to its left", caption))
    assert not re.search(r"\b(left|right|side)\b", caption), caption
    return bool(re.search(r"\b(below|under)\b(?! it)|above it", caption))


def test_captions_are_short_and_plain() -> None:
    texts = [text for five in captions_of(0, np.arange(3_000)) for text in five]
    counts = np.array([len(text.split()) for text in texts])
    assert counts.max() <= 20 and 10 < counts.mean() < 16
    assert all(re.fullmatch(r"[a-z ]+", text) for text in texts)
    vocabulary = {word for text in texts for word in text.split()}
    prompts = " ".join(scene_module.templates()).replace("{}", "") + " ".join(
        name + " " for kind in KINDS for name in scene_module.class_names(kind)
    )
    assert set(prompts.split()) <= vocabulary, "a class name or template has a word that no caption has"


def test_the_relation_can_be_seen() -> None:
    """The named direction dominates, objects never touch, and nothing leaves the picture."""
    scene = scene_module.scenes(1, np.arange(5_000))
    roots = scene_module.scene_roots(1, np.arange(5_000), "pairs", "train")
    draws = [scene_module.uniform(roots, name, 12).astype(np.float32) for name in ("radius", "place")]
    radius, x, y = pictures._place(scene, *draws)
    two = scene.layout > 0
    present = scene.shape >= 0
    for centre in (x, y):
        assert (centre - radius)[present].min() > 0 and (centre + radius)[present].max() < 1
    dx, dy = (x[:, 1] - x[:, 0])[two], (y[:, 1] - y[:, 0])[two]
    side = scene.layout[two] == 1
    along, across = np.where(side, dx, dy), np.where(side, dy, dx)
    assert (along > 3 * np.abs(across)).all()
    assert (along > radius.sum(axis=1)[two]).all()


# Pictures


@pytest.mark.parametrize("size", [32, 64, 96])
def test_objects_have_the_colour_that_they_are_said_to_have(size: int) -> None:
    """Solid objects, at their centre: the nearest named colour is the right one, however the light falls."""
    indices = np.arange(3_000)
    scene = scene_module.scenes(0, indices, kind="objects")
    solid = (scene.texture[:, 0] == 0) & ~np.isin(
        scene.shape[:, 0], [SHAPES.index("ring"), SHAPES.index("crescent")]
    )
    indices = indices[solid][:400]
    roots = scene_module.scene_roots(0, indices, "objects", "train")
    draws = [scene_module.uniform(roots, name, 12).astype(np.float32) for name in ("radius", "place")]
    _, x, y = pictures._place(scene_module.scenes(0, indices, kind="objects"), *draws)
    images = pictures.render(0, indices, kind="objects", size=size)
    centre = images[np.arange(len(indices)), (y[:, 0] * size).astype(int), (x[:, 0] * size).astype(int)]
    hue = centre / np.linalg.norm(centre.astype(np.float32), axis=1, keepdims=True)
    known = pictures._COLOUR_RGB / np.linalg.norm(pictures._COLOUR_RGB, axis=1, keepdims=True)
    found = (hue @ known.T).argmax(axis=1)
    assert (found == scene.colour[solid, 0][:400]).mean() > 0.9


def test_sizes_show_the_same_scene() -> None:
    small = pictures.render(0, np.arange(40), size=32).astype(np.float32)
    large = pictures.render(0, np.arange(40), size=96).reshape(40, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, large, strict=True)]
    assert min(agreement) > 0.8


def test_outlines_are_distinct_and_fill_their_circle() -> None:
    grid = np.linspace(-1.2, 1.2, 97, dtype=np.float32)
    inside = [outline(grid[None, :], grid[:, None]) < 0 for outline in pictures._OUTLINES]
    assert len(inside) == len(SHAPES)
    for a, name in enumerate(SHAPES):
        rows, columns = np.nonzero(inside[a])
        assert 0.15 < inside[a].mean() < 0.6 and np.ptp(rows) > 36 and np.ptp(columns) > 36, name
        for b in range(a):
            overlap = (inside[a] & inside[b]).sum() / (inside[a] | inside[b]).sum()
            assert overlap < 0.86, (name, SHAPES[b])


# Whether the centre is inside, the outline its own mirror image sideways and upside down, and its share of the box.
OUTLINES = {
    "circle": (1, 1, 1, 0.785),
    "ring": (0, 1, 1, 0.62),
    "crescent": (0, 0, 1, 0.57),
    "square": (1, 1, 1, 1.0),
    "triangle": (1, 1, 0, 0.5),
    "diamond": (1, 1, 1, 0.5),
    "star": (1, 1, 0, 0.35),
    "heart": (1, 1, 0, 0.67),
    "cross": (1, 1, 1, 0.55),
    "arrow": (1, 1, 0, 0.45),
    "hourglass": (1, 1, 1, 0.55),
    "pill": (1, 1, 1, 0.9),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_outline_is_that_of_its_name(name: str) -> None:
    grid = np.linspace(-1.2, 1.2, 97, dtype=np.float32)
    inside = pictures._OUTLINES[SHAPES.index(name)](grid[None, :], grid[:, None]) < 0
    rows, columns = np.nonzero(inside)
    share = inside.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    found = (
        inside[48, 48],
        (inside == inside[:, ::-1]).mean() > 0.99,
        (inside == inside[::-1]).mean() > 0.99,
    )
    assert found == OUTLINES[name][:3] and share == pytest.approx(OUTLINES[name][3], abs=0.08)


def test_a_texture_is_that_of_its_name() -> None:
    p, q = (grid.astype(np.float32) for grid in np.meshgrid(np.linspace(0, 1, 256), np.linspace(0, 1, 256)))
    half = np.full((4, 4), 0.5, np.float32)  # no phase; stripes run straight across
    marks = pictures._marks(np.arange(4), np.stack([p] * 4), np.stack([q] * 4), half, 256)
    solid, striped, dotted, checked = (marks[TEXTURES.index(name)] for name in TEXTURES)
    assert not solid.any()
    assert np.ptp(striped, axis=1).max() < 0.01 and 0.4 < striped.mean() < 0.6
    assert 0.2 < dotted.mean() < 0.35
    assert np.ptp(checked, axis=1).max() > 0.9 and 0.4 < checked.mean() < 0.6


# Labels


@pytest.mark.parametrize("kind", ["objects", "scenes"])
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_and_say_what_is_shown(kind: Kind, split: Split) -> None:
    names = scene_module.class_names(kind)
    indices = np.arange(1_000)
    labels = scene_module.labels(0, indices, kind=kind, split=split)
    counts = np.bincount(labels, minlength=len(names))
    assert len(counts) == len(names) == len(set(names)) and np.ptp(counts) <= 1
    scene = scene_module.scenes(0, indices, kind=kind, split=split)
    for row, label in enumerate(labels):
        said = set(names[label].split())
        if kind == "objects":
            assert scene.layout[row] == 0 and said <= words_of(scene, row, 0)
        else:
            layout = ("single", "side", "stacked")[scene.layout[row]]
            assert {BACKGROUNDS[scene.background[row]], layout} <= said


def test_attributes_are_named_a_word_each_in_one_order() -> None:
    names = scene_module.class_names("attributes")
    assert len(names) == len(set(names)) == 12 * 8 * 4 * 2
    indices = np.arange(2_000)
    labels = scene_module.labels(3, indices, kind="attributes", split="test")
    scene = scene_module.scenes(3, indices, kind="attributes", split="test")
    assert (scene.layout == 0).all()
    for row, label in enumerate(labels):
        size, texture, colour, shape = names[label].split()
        assert (SIZES[scene.size[row, 0]], TEXTURES[scene.texture[row, 0]]) == (size, texture)
        assert (COLOURS[scene.colour[row, 0]], SHAPES[scene.shape[row, 0]]) == (colour, shape)


# Mistakes


@pytest.mark.parametrize(
    "call",
    [
        lambda: pictures.render(0, np.arange(3), kind=cast(Kind, "pair")),
        lambda: pictures.render(0, np.arange(3), split=cast(Split, "training")),
        lambda: pictures.render(0, np.array([-1])),
        lambda: pictures.render(0, np.array([0.5])),
        lambda: pictures.render(0, np.array([[1]])),
        lambda: pictures.render(0, np.arange(3), size=8),
        lambda: scene_module.labels(0, np.arange(3), kind="pairs"),
    ],
)
def test_mistakes_are_usage_errors(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()


# Folders


def test_a_world_is_written_as_it_is_rendered(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    world = tmp_path / "deep" / "world"
    shapes.write_world(world, seed=4, **SMALL, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (41 + 3 * 51, 41 + 3 * 51)
    sets: tuple[tuple[str, Kind, Split, int], ...] = (
        ("train", "pairs", "train", 30),
        ("test", "pairs", "test", 6),
        ("objects/train", "objects", "train", 40),
        ("objects/test", "objects", "test", 6),
        ("scenes/val", "scenes", "val", 5),
        ("attributes/train", "attributes", "train", 40),
    )
    for folder, kind, split, count in sets:
        source = open_shards(str(world / folder))
        indices = np.arange(count)
        assert len(source) == count and not source.problems
        assert tuple(source.class_names) == scene_module.class_names(kind)
        assert tuple(source.templates) == (() if kind == "pairs" else scene_module.templates())
        images = pictures.render(4, indices, kind=kind, split=split)
        for i in indices.tolist():
            np.testing.assert_array_equal(np.asarray(decode(source.image(i), f"{i}")), images[i])
            record = source.record(i)
            if kind == "pairs":
                assert record.label is None
                assert record.captions == captions_of(4, indices, split=split)[i]
            else:
                assert record.captions == ()
                assert record.label == scene_module.labels(4, indices, kind=kind, split=split)[i]
    templates = world / "scenes" / "val" / "zeroshot_classification_templates.txt"
    assert "a picture of a {c}" in templates.read_text().splitlines()  # CLIP_benchmark formats with c=


def test_some_kinds_and_no_labelled_training_sets_can_be_asked_for(tmp_path: Path) -> None:
    shapes.write_world(tmp_path / "world", **(SMALL | {"num_labelled": 0}))
    assert not list(tmp_path.glob("world/*/train"))
    assert len(open_shards(str(tmp_path / "world" / "objects" / "val"))) == 5
    shapes.write_world(tmp_path / "objects", **SMALL, kinds=("objects",))
    assert sorted(path.name for path in (tmp_path / "objects").iterdir()) == ["objects", "world.json"]
    with pytest.raises(DataError, match="kinds is"):
        shapes.write_world(tmp_path / "objects", **SMALL)


def test_writing_twice_is_a_no_op_and_other_parameters_are_an_error(tmp_path: Path) -> None:
    world = tmp_path / "world"
    shapes.write_world(world, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    shapes.write_world(world, **SMALL, progress=lambda done, total: pytest.fail("wrote again"))
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(DataError, match=r"seed is 0, asked is 1.*another folder"):
        shapes.write_world(world, seed=1, **SMALL)
    with pytest.raises(DataError, match="num_val is 5, asked is 7"):
        shapes.write_world(world, **(SMALL | {"num_val": 7}))
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    shapes.write_world(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(world)


@pytest.mark.parametrize("stop", [1, 20, 43, 100])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Iterator[ShardSample]:
        for count, sample in enumerate(samples(*args, **kwargs)):
            if next(left) == 0:
                raise KeyboardInterrupt(count)
            yield sample

    samples, left = shapes._samples, iter(range(stop, -1, -1))
    monkeypatch.setattr(shapes, "_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_world(tmp_path / "world", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    shapes.write_world(tmp_path / "world", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_partial_folder_of_a_killed_write_is_not_taken_for_the_world(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()  # an empty folder may stand there
    (tmp_path / ".world.0.partial").mkdir()
    shapes.write_world(tmp_path / "world", **SMALL)
    assert json.loads((tmp_path / "world" / "world.json").read_text())["num_train"] == 30


@pytest.mark.parametrize("found", [None, b"", b"{", b"[]", b"{}", b'{"world": "shapes"}', b"\xff"])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path, found: bytes | None) -> None:
    (tmp_path / "precious.txt").write_text("x")
    if found is not None:
        (tmp_path / "world.json").write_bytes(found)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="another folder"):
        shapes.write_world(tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_a_world_that_another_process_finished_first_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, write_sets = tmp_path / "world", shapes._write_sets

    def raced(*args: Any) -> None:
        monkeypatch.setattr(shapes, "_write_sets", write_sets)
        shapes.write_world(world, **SMALL)
        write_sets(*args)

    monkeypatch.setattr(shapes, "_write_sets", raced)
    shapes.write_world(world, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_place_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "world"):
        with pytest.raises(DataError, match="another folder"):
            shapes.write_world(place, **SMALL)
    with pytest.raises(UsageError):
        shapes.write_world(tmp_path / "world", **(SMALL | {"num_test": 0}))
    with pytest.raises(UsageError, match="one kind"):
        shapes.write_world(tmp_path / "world", **SMALL, kinds=())
