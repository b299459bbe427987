"""Wrong captions of the built-in world: a scene's caption with one thing changed that makes it false.

    open_negatives(Path("data/shapes"))        # choices over the test pictures, for evaluate/composition.py

A negative is the caption of another scene, made by the same grammar. The other scene is as probable as the first, and
from it the same change leads back as often. Right and wrong captions are then alike in distribution, and a model that
sees the text alone is right in half of the choices, whatever it knows about the world's captions.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from threetowers.data.choices import ChoiceRow, ChoiceSet, choice_set
from threetowers.data.open import open_source
from threetowers.data.order import hash64, uniforms
from threetowers.errors import DataError
from threetowers.world.captions import LANES, five_texts
from threetowers.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    NEW_IN_TEST,
    NEW_IN_VAL,
    SHAPES,
    SIZES,
    TEXTURES,
    VERSION,
    Ints,
    Split,
    scene_roots,
    scenes,
    uniform,
)

_NEVER: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (*NEW_IN_VAL, *NEW_IN_TEST),
    "val": NEW_IN_TEST,
    "test": (),
}
"""The pairs of colour and shape that no scene of a split has."""
_SINGLE = "a single shape"  # how the caption begins that says there is one object


class Negative(NamedTuple):
    """A scene's caption, and a false one. scene: its index. category: one of CATEGORIES."""

    scene: int
    category: str
    caption: str
    negative: str


class _Thing(NamedTuple):
    """An object, as indices into the word lists, in the order in which captions take them."""

    shape: int
    colour: int
    texture: int
    size: int


@dataclass(frozen=True)
class _Scene:
    """A scene and what its wording depends on. things: left or upper one first. draws: [5][LANES] in [0, 1)."""

    background: int
    layout: int
    things: tuple[_Thing, ...]
    draws: list[list[float]]

    def captions(self) -> tuple[str, ...]:
        return five_texts(BACKGROUNDS[self.background], self.layout, list(self.things), self.draws)


_Change = Callable[[_Scene, Split, list[float]], _Scene | None]
"""Another scene, or None where the change is not possible. The numbers are in [0, 1)."""


def _swap(field: str) -> _Change:
    """Two objects exchange an attribute. There must be two, which differ in it."""

    def change(scene: _Scene, split: Split, u: list[float]) -> _Scene | None:
        if len(scene.things) < 2:
            return None
        a, b = scene.things
        if getattr(a, field) == getattr(b, field):
            return None
        return replace(
            scene, things=(a._replace(**{field: getattr(b, field)}), b._replace(**{field: getattr(a, field)}))
        )

    return change


def _swap_relation(scene: _Scene, split: Split, u: list[float]) -> _Scene | None:
    """Two objects exchange places. They are worded, and named first and second, as before: the relation changes."""
    if len(scene.things) < 2:
        return None
    return replace(scene, things=scene.things[::-1], draws=[_named_alike(draw) for draw in scene.draws])


def _named_alike(draw: list[float]) -> list[float]:
    """The draws of a caption in which each object is worded and named where the one in the other place was."""
    return [draw[0], (draw[1] + 0.5) % 1.0, *_exchanged(draw)[2:]]


def _change_colour(scene: _Scene, split: Split, u: list[float]) -> _Scene | None:
    """One object takes another colour, of those that it can have beside the other object."""
    which = int(u[0] * len(scene.things))
    thing, others = scene.things[which], scene.things[:which] + scene.things[which + 1 :]
    colours = [
        colour
        for colour in range(len(COLOURS))
        if colour != thing.colour
        and not any((other.colour, other.shape) == (colour, thing.shape) for other in others)
        and (COLOURS[colour], SHAPES[thing.shape]) not in _NEVER[split]
    ]
    changed = thing._replace(colour=colours[int(u[1] * len(colours))])
    return replace(scene, things=tuple(changed if i == which else t for i, t in enumerate(scene.things)))


def _change_count(scene: _Scene, split: Split, u: list[float]) -> _Scene | None:
    """One of two objects is left out, or a second one is added, drawn as the world draws it."""
    first = u[0] < 0.5  # whether the object that stays alone is, or comes to be, the left or upper one
    draws = scene.draws if first else [_exchanged(draw) for draw in scene.draws]  # its wording goes with it
    if len(scene.things) == 2:
        return replace(scene, layout=0, things=(scene.things[0 if first else 1],), draws=draws)
    (thing,) = scene.things
    pairs = [
        (shape, colour)
        for shape in range(len(SHAPES))
        for colour in range(len(COLOURS))
        if (shape, colour) != (thing.shape, thing.colour)
        and (COLOURS[colour], SHAPES[shape]) not in _NEVER[split]
    ]
    shape, colour = pairs[int(u[1] * len(pairs))]
    added = _Thing(shape, colour, int(u[2] * len(TEXTURES)), int(u[3] * len(SIZES)))
    layout = 1 + int(u[4] * 2)
    return replace(scene, layout=layout, things=(thing, added) if first else (added, thing), draws=draws)


def _exchanged(draw: list[float]) -> list[float]:
    """The draws of a caption with those of its two objects exchanged."""
    return [*draw[:4], *draw[8:12], *draw[4:8]]


_CHANGES: dict[str, _Change] = {
    "swap_colour": _swap("colour"),
    "swap_texture": _swap("texture"),
    "swap_size": _swap("size"),
    "swap_relation": _swap_relation,
    "change_colour": _change_colour,
    "change_count": _change_count,
}
CATEGORIES = tuple(_CHANGES)
"""swap_colour, swap_texture, swap_size: two objects have exchanged it. swap_relation: left and right, or above and
below, are exchanged. change_colour: one object has another colour. change_count: one object instead of two, or two
instead of one."""


def hard_negatives(seed: int, indices: Ints, *, split: Split = "test") -> list[Negative]:
    """The wrong captions of `pairs` scenes, at most one a category and scene, by category.

    indices: [B], each 0 or more. A change that would leave the caption true, or lead to a scene that the split cannot
    have, is left out. The caption is the complete one that the world on disk has first; of `change_count` it is the
    one that says for a single object that it is single, and as many choices are of one object as of two.
    Raises UsageError as `scenes` does.

        hard_negatives(0, np.arange(100))[0].negative
    """
    found = []
    all_scenes = _scenes(seed, indices, split)
    for category, change in _CHANGES.items():
        chosen = dict(zip(indices.tolist(), all_scenes, strict=True))
        if category == "change_count":
            chosen = _balanced(chosen, seed)
        for index, scene in chosen.items():
            other = change(scene, split, uniforms(5, "negative", seed, split, category, index))
            if other is not None and _possible(other, split):
                number = _counting(scene, other) if category == "change_count" else 0
                found.append(Negative(index, category, scene.captions()[number], other.captions()[number]))
    return found


def _scenes(seed: int, indices: Ints, split: Split) -> list[_Scene]:
    content = scenes(seed, indices, split=split)
    draws = uniform(scene_roots(seed, indices, "pairs", split), "caption", 5 * LANES).reshape(-1, 5, LANES)
    columns = np.stack([content.shape, content.colour, content.texture, content.size], axis=2)  # [B, S, 4]
    return [
        _Scene(background, layout, tuple(_Thing(*of) for of in things[: 1 if layout == 0 else 2]), draw)
        for background, layout, things, draw in zip(
            content.background.tolist(),
            content.layout.tolist(),
            columns.tolist(),
            draws.tolist(),
            strict=True,
        )
    ]


def _balanced(chosen: dict[int, _Scene], seed: int) -> dict[int, _Scene]:
    """As many scenes of one object as of two: else the more frequent number would be the better guess."""
    order = sorted(chosen, key=lambda index: hash64("negative", seed, index))
    single = [index for index in order if chosen[index].layout == 0]
    double = [index for index in order if chosen[index].layout != 0]
    num = min(len(single), len(double))
    return {index: chosen[index] for index in sorted(single[:num] + double[:num])}


def _possible(scene: _Scene, split: Split) -> bool:
    """Whether the split can have a scene: only its pairs of colour and shape, and not the same pair twice."""
    pairs = [(COLOURS[thing.colour], SHAPES[thing.shape]) for thing in scene.things]
    return len(set(pairs)) == len(pairs) and not set(pairs) & set(_NEVER[split])


def _counting(scene: _Scene, other: _Scene) -> int:
    """The number of the caption that says of the scene with a single object that it is single."""
    texts = (scene if scene.layout == 0 else other).captions()
    return next(number for number, text in enumerate(texts) if text.startswith(_SINGLE))


def open_negatives(folder: Path, *, split: Split = "test") -> ChoiceSet:
    """The choices between right and wrong captions over a part of a world that `write_world` wrote.

    Raises DataError for a folder that holds no world of this version, or other captions than those of its seed.
    """
    seed = _seed(folder)
    images = open_source(str(folder / split))
    numbers = [int(images.record(row).id.rpartition("/")[2]) for row in range(len(images))]
    place = {number: row for row, number in enumerate(numbers)}
    found = hard_negatives(seed, np.array(numbers), split=split)
    for negative in found:
        if negative.caption not in images.record(place[negative.scene]).captions:
            raise DataError(
                f"{folder / split}: sample {negative.scene} has other captions than the world of seed {seed}. Write it "
                "again into another folder"
            )
    rows = [
        ChoiceRow(
            f"{each.category}/{each.scene}",
            each.category,
            (place[each.scene],),
            (each.caption, each.negative),
        )
        for each in found
    ]
    layout = f"wrong captions of the shapes world, {len(rows)} choices in {len(CATEGORIES)} categories"
    return choice_set(f"{folder.resolve().name}/{split}", layout, "one_caption", rows, images)


def _seed(folder: Path) -> int:
    """The seed that world.json states; raises DataError when it is not there or is of another version."""
    try:
        about = json.loads((folder / "world.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: it holds no shapes world, which has a file world.json. Give a folder that `write_world` wrote"
        ) from error
    if not isinstance(about, dict) or (about.get("world"), about.get("version")) != ("shapes", VERSION):
        raise DataError(f"{folder}: world.json is not of a shapes world of version {VERSION}. Write it again")
    return int(about["seed"])
