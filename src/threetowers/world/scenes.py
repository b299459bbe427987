"""The content of each scene of the built-in world: a pure function of (seed, kind, split, index).

A scene has one or two objects (shape, colour, texture, size) on one of six backgrounds. All draws come from a
counter-based hash, so that a scene can be made alone or in any batch.

Shape suffixes: B scenes, S slots for objects (2).
"""

# NumPy's stubs type the results of its ufuncs as Any.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from threetowers.data.order import hash64
from threetowers.errors import UsageError

Kind = Literal["pairs", "objects", "scenes", "attributes"]
Split = Literal["train", "val", "test"]
Floats = NDArray[np.floating[Any]]  # float32 throughout
Ints = NDArray[np.int64]

VERSION = 3  # of the world as it is written: raised whenever any image, caption, label or set changes
KINDS: tuple[Kind, ...] = ("pairs", "objects", "scenes", "attributes")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# fmt: off
SHAPES = ("circle", "ring", "crescent", "square", "triangle", "diamond",
          "star", "heart", "cross", "arrow", "hourglass", "pill")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
# fmt: on
TEXTURES = ("solid", "striped", "dotted", "checked")
SIZES = ("small", "large")
BACKGROUNDS = ("grass", "sand", "snow", "water", "brick", "carpet")
LAYOUTS = ("single", "side by side", "stacked")
SYNONYMS = {"solid": "plain", "dotted": "spotted", "small": "little", "large": "big", "checked": "chequered"}

# Held-out pairs, which no training scene has. Each has a colour and a shape of its own, and both words occur in many
# other scenes. Test scenes have all six. Validation has three of them, so that what is chosen there is chosen for new
# pairs as well, and leaves three that no choice depends on.
NEW_IN_VAL = (("red", "star"), ("yellow", "cross"), ("green", "circle"))
NEW_IN_TEST = (("blue", "hourglass"), ("purple", "triangle"), ("pink", "arrow"))
_ALL_PAIRS = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)
_VAL_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in NEW_IN_TEST)
_PAIRS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": tuple(pair for pair in _VAL_PAIRS if pair not in NEW_IN_VAL),
    "val": _VAL_PAIRS,
    "test": _ALL_PAIRS,
}

# Every draw has a range of hash counters of its own, so that a name can be appended without changing other draws.
# fmt: off
_DRAWS = ("pair", "texture", "size", "background", "layout", "radius", "place", "turn", "tint", "light", "phase",
          "texture_phase", "noise_level", "noise", "caption")
# fmt: on
_MAX_LANES = 1 << 32
CHUNK = 128  # scenes rendered together; about what stays in a core's cache at 32 px


@dataclass(frozen=True, slots=True)
class Scenes:
    """What is in B scenes, as indices into the word lists; slot 0 is the left or upper object.

    background, layout: [B]. shape, colour, texture, size: [B, 2], where slot 1 is -1 in a single-object scene.
    """

    background: Ints
    layout: Ints
    shape: Ints
    colour: Ints
    texture: Ints
    size: Ints


def scenes(seed: int, indices: Ints, *, kind: Kind = "pairs", split: Split = "train") -> Scenes:
    """The content of the scenes at these indices.

    indices: [B], each 0 or more, without an upper bound. `objects` and `scenes` cycle through their classes, so that
    consecutive indices are balanced; `attributes` are drawn as the objects of `pairs` are. Six pairs of colour and
    shape never occur in training splits; validation splits show three of them, test splits all.
    Raises UsageError on an unknown kind or split, or on indices that are not a vector of whole numbers >= 0.
    """
    roots = scene_roots(seed, indices, kind, split)
    indices = indices.astype(np.int64)
    pairs = _PAIRS[split]
    colour_of = np.array([COLOURS.index(colour) for colour, _ in pairs])
    shape_of = np.array([SHAPES.index(shape) for _, shape in pairs])

    u_pair, u_layout = uniform(roots, "pair", 2), uniform(roots, "layout", 2)
    first = _choice(u_pair[:, 0], len(pairs))
    layout = np.where(u_layout[:, 0] < 0.2, 0, 1 + _choice(u_layout[:, 1], 2))
    background = _choice(uniform(roots, "background")[:, 0], len(BACKGROUNDS))
    texture = _choice(uniform(roots, "texture", 2), len(TEXTURES))
    size = _choice(uniform(roots, "size", 2), len(SIZES))
    if kind == "objects":
        shape, texture[:, 0] = indices // len(TEXTURES) % len(SHAPES), indices % len(TEXTURES)
        of_shape = np.bincount(shape_of)[shape]  # pairs are sorted by shape
        first = np.searchsorted(shape_of, shape) + (u_pair[:, 0] * of_shape).astype(np.int64)
        layout = np.zeros_like(indices)
    elif kind == "attributes":
        layout = np.zeros_like(indices)
    elif kind == "scenes":
        background, layout = indices % len(BACKGROUNDS), indices // len(BACKGROUNDS) % len(LAYOUTS)
    second = (first + 1 + _choice(u_pair[:, 1], len(pairs) - 1)) % len(pairs)  # never the first pair again

    pair = np.stack([first, second], axis=1)
    empty = (layout[:, None] == 0) & (np.arange(2) == 1)
    per_object = [np.where(empty, -1, of) for of in (shape_of[pair], colour_of[pair], texture, size)]
    return Scenes(background, layout, *per_object)


def labels(seed: int, indices: Ints, *, kind: Kind, split: Split = "train") -> Ints:
    """[B] class of each scene, an index into `class_names(kind)`. Raises UsageError for `pairs`."""
    if kind == "pairs":
        raise UsageError(
            "The kind `pairs` has captions and no labels. Ask for kind 'objects', 'scenes' or 'attributes'."
        )
    content = scenes(seed, indices, kind=kind, split=split)
    if kind == "attributes":
        shape, colour, texture, size = (
            of[:, 0] for of in (content.shape, content.colour, content.texture, content.size)
        )
        return ((size * len(TEXTURES) + texture) * len(COLOURS) + colour) * len(SHAPES) + shape
    return indices.astype(np.int64) % len(class_names(kind))


def class_names(kind: Kind) -> tuple[str, ...]:
    """Names of the classes in the words of the captions, for zero-shot classification; none for `pairs`.

    The 48 `objects` are combinations of texture and shape: a tower trained on them learns what captions are about, but
    no colours or relations. The 18 `scenes` are combinations of layout and background: such a tower learns no objects.
    The 768 `attributes` name size, texture, colour and shape of one object, a word each.
    """
    if kind == "objects":
        return tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
    if kind == "scenes":
        counts = ("single shape", "pair of shapes side by side", "pair of shapes stacked")
        return tuple(f"{count} on {background}" for count in counts for background in BACKGROUNDS)
    if kind == "attributes":
        return tuple(" ".join(words) for words in product(SIZES, TEXTURES, COLOURS, SHAPES))
    return ()


def templates() -> tuple[str, ...]:
    """Prompts around a class name `{}`, in the words of the captions; they fit the names of every kind."""
    return ("a {}", "a picture of a {}", "there is a {}", "a picture with a {}")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def scene_roots(seed: int, indices: Ints, kind: str, split: str) -> NDArray[np.uint64]:
    """[B] one 64-bit state per scene; each split of each kind has a stream of its own."""
    if kind not in KINDS or split not in SPLITS:
        raise UsageError(
            f"The shapes world has no kind {kind!r} with split {split!r}. "
            f"Kinds are {', '.join(KINDS)}; splits are {', '.join(SPLITS)}."
        )
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or (indices < 0).any():
        raise UsageError(
            f"Scene indices must be a vector of whole numbers >= 0; got {indices.dtype} of shape "
            f"{indices.shape}. Give for example np.arange(16)."
        )
    stream = np.array([hash64("shapes", seed, kind, split)], np.uint64)
    return _mix(stream + _mix(indices.astype(np.uint64)))


def hashes(roots: NDArray[np.uint64], name: str, count: int) -> NDArray[np.uint64]:
    """[B, count] independent 64-bit numbers for the draw of this name."""
    lanes = np.arange(count, dtype=np.uint64) + np.uint64(_DRAWS.index(name) * _MAX_LANES)
    return _mix(roots[:, None] + _mix(lanes))


def uniform(roots: NDArray[np.uint64], name: str, count: int = 1) -> NDArray[np.float64]:
    """[B, count] uniform numbers in [0, 1)."""
    return (hashes(roots, name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _choice(u: NDArray[np.float64], count: int) -> Ints:
    return (u * count).astype(np.int64)
