"""The built-in world `shapes`: rendered scenes with true captions, for trials that need no download.

One or two objects (shape, colour, texture, size) stand on one of six backgrounds. Everything about a scene follows
from (seed, kind, split, index) through a counter-based hash, so any scene can be made alone or in any batch. The
renderer uses only operations that IEEE 754 rounds correctly (no sin, no exp), so its bytes do not depend on the
batch, the processor or the NumPy version.

Shape suffixes: B scenes, H height, W width, S slots for objects (2).
"""

# NumPy's stubs type the results of its ufuncs as Any.
# mypy: disable-error-code="no-any-return"

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from threetowers.data.order import hash64
from threetowers.errors import DataError, UsageError

if TYPE_CHECKING:
    from threetowers.data.shards import ShardSample

Kind = Literal["pairs", "objects", "scenes"]
Split = Literal["train", "val", "test"]
Floats = NDArray[np.floating[Any]]  # float32 throughout
Ints = NDArray[np.int64]

VERSION = 1  # of the scenes themselves: raised whenever any image, caption or label changes
KINDS: tuple[Kind, ...] = ("pairs", "objects", "scenes")
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

# Each held-out pair has its own colour and its own shape, so both words are well known from other scenes.
HELD_OUT = (
    *(("red", "star"), ("yellow", "cross"), ("green", "circle")),
    *(("blue", "hourglass"), ("purple", "triangle"), ("pink", "arrow")),
)
_ALL_PAIRS = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT)

# Every draw has its own lane of the hash: appending a name changes no other draw.
# fmt: off
_DRAWS = ("pair", "texture", "size", "background", "layout", "radius", "place", "turn", "tint", "light", "phase",
          "texture_phase", "noise_level", "noise", "caption")
# fmt: on
_MAX_LANES = 1 << 32
_CHUNK = 128  # scenes rendered together; about what stays in a core's cache at 32 px


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

    def holds_held_out(self) -> NDArray[np.bool_]:
        """[B]: whether any object is one of the colour and shape pairs that only test scenes show."""
        found = np.zeros(self.shape.shape, bool)
        for colour, shape in HELD_OUT:
            found |= (self.colour == COLOURS.index(colour)) & (self.shape == SHAPES.index(shape))
        return found[:, 0] | found[:, 1]


def scenes(seed: int, indices: Ints, *, kind: Kind = "pairs", split: Split = "train") -> Scenes:
    """What the scenes at these indices show, before anything is drawn.

    indices: [B], each 0 or more; there is no last one. Labelled kinds cycle through their classes, so any run of
    indices is balanced. Held-out pairs of colour and shape occur in test splits only.
    Raises UsageError on an unknown kind or split, or on indices that are not a vector of whole numbers >= 0.
    """
    roots = _roots(seed, indices, kind, split)
    indices = indices.astype(np.int64)
    pairs = _ALL_PAIRS if split == "test" else _SEEN_PAIRS
    colour_of = np.array([COLOURS.index(colour) for colour, _ in pairs])
    shape_of = np.array([SHAPES.index(shape) for _, shape in pairs])

    u_pair, u_layout = _uniform(roots, "pair", 2), _uniform(roots, "layout", 2)
    first = _choice(u_pair[:, 0], len(pairs))
    layout = np.where(u_layout[:, 0] < 0.2, 0, 1 + _choice(u_layout[:, 1], 2))
    background = _choice(_uniform(roots, "background")[:, 0], len(BACKGROUNDS))
    texture = _choice(_uniform(roots, "texture", 2), len(TEXTURES))
    size = _choice(_uniform(roots, "size", 2), len(SIZES))
    if kind == "objects":
        shape, texture[:, 0] = indices // len(TEXTURES) % len(SHAPES), indices % len(TEXTURES)
        of_shape = np.bincount(shape_of)[shape]  # pairs are sorted by shape
        first = np.searchsorted(shape_of, shape) + (u_pair[:, 0] * of_shape).astype(np.int64)
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
        raise UsageError("The kind `pairs` has captions and no labels. Ask for kind 'objects' or 'scenes'.")
    _roots(seed, indices, kind, split)  # the same checks as everywhere
    return indices.astype(np.int64) % len(class_names(kind))


def class_names(kind: Kind) -> tuple[str, ...]:
    """Names of the classes in the captions' own words, for zero-shot classification; none for `pairs`.

    The 48 `objects` are shape and texture: a tower that learns them sees what captions speak of, but was never
    told of colours or relations. The 18 `scenes` are background and layout: such a tower knows no object.
    """
    if kind == "objects":
        return tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
    if kind == "scenes":
        counts = ("single shape", "pair of shapes side by side", "pair of shapes stacked")
        return tuple(f"{count} on {background}" for count in counts for background in BACKGROUNDS)
    return ()


def templates() -> tuple[str, ...]:
    """Prompts around a class name `{}`, in the captions' own words; they fit the names of every kind."""
    return ("a {}", "a picture of a {}", "there is a {}", "a picture with a {}")


# Random numbers -------------------------------------------------------------------------------------------------


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _roots(seed: int, indices: Ints, kind: str, split: str) -> NDArray[np.uint64]:
    """[B] one 64-bit state per scene; the three splits of each kind are streams of their own."""
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


def _hashes(roots: NDArray[np.uint64], name: str, count: int) -> NDArray[np.uint64]:
    """[B, count] independent 64-bit numbers for the draw of this name."""
    lanes = np.arange(count, dtype=np.uint64) + np.uint64(_DRAWS.index(name) * _MAX_LANES)
    return _mix(roots[:, None] + _mix(lanes))


def _uniform(roots: NDArray[np.uint64], name: str, count: int = 1) -> NDArray[np.float64]:
    """[B, count] uniform numbers in [0, 1)."""
    return (_hashes(roots, name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _choice(u: NDArray[np.float64], count: int) -> Ints:
    return (u * count).astype(np.int64)


# Captions -------------------------------------------------------------------------------------------------------

# {a} and {b} are the objects with article; {rel} says where a is seen from b, {at} where b is seen from a.
_TWO = (
    "{a} {rel} {b} on {bg}",
    "on {bg} {a} {rel} {b}",
    "{a} on {bg} with {b} {at}",
    "a picture of {a} {rel} {b} on {bg}",
    "there is {a} {rel} {b} on {bg}",
    "{a} with {b} {at}",
    "a pair of shapes {layout} on {bg} with {a} {rel} {b}",
)
_ONE = (
    "{a} on {bg}",
    "on {bg} there is {a}",
    "a picture of {a} on {bg}",
    "a single shape on {bg} and it is {a}",
    "a picture with {bg} and {a}",
    "there is {a}",
)
# By [layout - 1][whether the right or lower object is named first].
_REL = (
    (("left of", "to the left of"), ("right of", "to the right of")),
    (("above", "over"), ("below", "under")),
)
_AT = (("to its right", "to its left"), ("below it", "above it"))
_LANES = 12  # uniform numbers per caption: template, order, words of relation, spare, then four per object


def captions(seed: int, indices: Ints, *, split: Split = "train") -> list[tuple[str, ...]]:
    """Five different wordings of each `pairs` scene, every one true, of 3 to 20 words without punctuation.

    The first names everything: both objects with size, texture, colour and shape, their relation and the
    background. The others leave out some of it. Right and left are the viewer's.
    """
    shown = scenes(seed, indices, split=split)
    roots = _roots(seed, indices, "pairs", split)
    draws = _uniform(roots, "caption", 5 * _LANES).reshape(-1, 5, _LANES).tolist()
    columns = (shown.background, shown.layout, shown.shape, shown.colour, shown.texture, shown.size)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    result = []
    for (background, layout, *of_objects), draw in zip(rows, draws, strict=True):
        objects = list(zip(*of_objects, strict=True))[: 1 if layout == 0 else 2]
        result.append(_five(BACKGROUNDS[background], layout, objects, draw))
    return result


def _five(
    background: str, layout: int, objects: list[tuple[int, ...]], draws: list[list[float]]
) -> tuple[str, ...]:
    forms = _ONE if layout == 0 else _TWO
    first = int(draws[0][0] * 4)  # the first four forms can name everything
    texts = []
    for k, u in enumerate(draws):
        form = forms[(first + k) % len(forms)]  # five different forms, so five different texts
        short = form is _TWO[-1]
        names = [_noun(o, u[4 * i + 4 : 4 * i + 8], k == 0, short) for i, o in enumerate(objects)]
        if layout == 0:
            texts.append(form.format(a=names[0], bg=background))
            continue
        swap = u[1] < 0.5
        a, b = reversed(names) if swap else names
        rel = _REL[layout - 1][swap][u[2] < 0.4]
        at = _AT[layout - 1][swap]
        texts.append(form.format(a=a, b=b, rel=rel, at=at, bg=background, layout=LAYOUTS[layout]))
    return tuple(texts)


def _noun(thing: tuple[int, ...], u: list[float], full: bool, short: bool) -> str:
    """An object with its article, such as "a small striped red circle"; u in [0, 1)^4 picks words and gaps."""
    shape, colour, texture, size = SHAPES[thing[0]], COLOURS[thing[1]], TEXTURES[thing[2]], SIZES[thing[3]]
    words = []
    if full or (not short and u[0] < 0.85):
        words.append(SYNONYMS.get(size, size) if u[2] < 0.3 else size)
    textured = full or (not short and u[1] < 0.9)
    if textured:
        words.append(SYNONYMS.get(texture, texture) if 0.2 < u[2] < 0.5 else texture)
    if full or short or u[3] < 0.95:
        words.insert(len(words) - (textured and u[3] >= 0.7), colour)
    words.append(shape)
    vowel = words[0][0] in "aeio" or words[0] == "hourglass"
    return f"{'an' if vowel else 'a'} {' '.join(words)}"


# Pictures -------------------------------------------------------------------------------------------------------

# fmt: off
_COLOUR_RGB: Floats = np.array([(.88, .10, .10), (.98, .52, .05), (.98, .90, .10), (.10, .68, .15),
                        (.10, .85, .88), (.10, .22, .92), (.52, .14, .74), (1., .52, .76)], np.float32)
# Ground and pattern of each background: muted, so that the objects stand out.
_GROUND_RGB = np.array([((.60, .68, .46), (.45, .54, .32)), ((.84, .75, .56), (.72, .62, .42)),
                        ((.93, .94, .97), (.72, .76, .84)), ((.56, .70, .82), (.40, .55, .70)),
                        ((.62, .42, .36), (.82, .76, .70)), ((.19, .18, .34), (.82, .80, .72))], np.float32)
# fmt: on
_RADII = ((0.13, 0.15), (0.2, 0.225))  # smallest and largest radius of each size, in image sides
_MARGIN, _GAP = 0.02, 0.03
_TURN = 0.1  # tan of half the largest rotation: about 11 degrees


def render(
    seed: int, indices: Ints, *, kind: Kind = "pairs", size: int = 32, split: Split = "train"
) -> NDArray[np.uint8]:
    """Draws the scenes at these indices: uint8 [B, H, W, 3] sRGB with H = W = size pixels.

    The same scene at another size shows the same things in the same places. Raises UsageError as `scenes` does,
    and for a size below 16, where textures cannot be told apart.

    >>> render(0, np.arange(4), size=32).shape
    (4, 32, 32, 3)
    """
    if size < 16:
        raise UsageError(
            f"The shapes world cannot be drawn at {size} px. Give a size of 16 or more; 32 is usual."
        )
    roots = _roots(seed, indices, kind, split)
    shown = scenes(seed, indices, kind=kind, split=split)
    images = np.empty((len(indices), size, size, 3), np.uint8)
    for start in range(0, len(indices), _CHUNK):
        rows = slice(start, start + _CHUNK)
        fields = (getattr(shown, name)[rows] for name in Scenes.__slots__)
        images[rows] = _render_chunk(roots[rows], Scenes(*fields), size)
    return images


def _render_chunk(roots: NDArray[np.uint64], shown: Scenes, size: int) -> NDArray[np.uint8]:
    names = ("radius", "place", "turn", "tint", "light", "phase", "texture_phase", "noise_level")
    u = {name: _uniform(roots, name, 12).astype(np.float32) for name in names}
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, None, :]  # [1, 1, W]
    y = x.transpose(0, 2, 1)  # [1, H, 1], downwards
    canvas = _ground(shown.background, u["phase"], u["tint"][:, 9:12], x, y, size)
    radius, centre_x, centre_y = _place(shown, u["radius"], u["place"])
    for slot in range(2):
        rows = np.flatnonzero(shown.shape[:, slot] >= 0)
        r = radius[rows, slot, None, None]
        t = (u["turn"][rows, slot] * 2 - 1) * _TURN
        cos, sin = _col((1 - t * t) / (1 + t * t)), _col(2 * t / (1 + t * t))
        right, up = x - centre_x[rows, slot, None, None], centre_y[rows, slot, None, None] - y
        p, q = right * cos + up * sin, up * cos - right * sin  # the object's own axes, in image sides
        cover = np.empty_like(p)
        for shape in np.unique(shown.shape[rows, slot]):
            these = shown.shape[rows, slot] == shape
            distance = _OUTLINES[shape](p[these] / r[these], q[these] / r[these]) * r[these]
            cover[these] = _soft(distance * size)
        marks = _marks(
            shown.texture[rows, slot], p, q, u["texture_phase"][rows, 4 * slot : 4 * slot + 4], size
        )
        tint = u["tint"][rows, 3 * slot : 3 * slot + 3]
        colour = _COLOUR_RGB[shown.colour[rows, slot]] + (tint - 0.5) * 0.14
        colour = colour[:, :, None, None] * (1 - 0.75 * marks)[:, None]
        canvas[rows] += cover[:, None] * (colour - canvas[rows])
    canvas = _light(canvas, u["light"], x, y) * 255 + _noise(roots, u["noise_level"][:, 0], size)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _place(shown: Scenes, u_radius: Floats, u: Floats) -> tuple[Floats, Floats, Floats]:
    """Radius and centre [B, S] of every object, in image sides; two objects never touch or leave the picture."""
    low, high = np.array(_RADII, np.float32)[np.maximum(shown.size, 0)].transpose(2, 0, 1)
    radius = low + (high - low) * u_radius[:, :2]
    r1, r2 = radius[:, 0], radius[:, 1]
    single, side = shown.layout == 0, shown.layout == 1
    # Along the layout's axis the free length is cut at two random points: before, between and after the objects.
    free = 1 - 2 * _MARGIN - _GAP - 2 * (r1 + r2)
    before, until = np.minimum(u[:, 0], u[:, 1]) * free, np.maximum(u[:, 0], u[:, 1]) * free
    along1 = _MARGIN + before + r1
    along2 = _MARGIN + until + _GAP + 2 * r1 + r2
    # Across it the centres are nearly level, so that only the named relation holds.
    widest = np.maximum(r1, r2) + _MARGIN + 0.05
    level = widest + (1 - 2 * widest) * u[:, 2]
    across1, across2 = level + (u[:, 3] - 0.5) * 0.1, level
    room = 1 - 2 * (r1 + _MARGIN)
    x1 = np.where(single, r1 + _MARGIN + room * u[:, 0], np.where(side, along1, across1))
    y1 = np.where(single, r1 + _MARGIN + room * u[:, 1], np.where(side, across1, along1))
    x2, y2 = np.where(side, along2, across2), np.where(side, across2, along2)
    return radius, np.stack([x1, x2], axis=1), np.stack([y1, y2], axis=1)


def _col(of_scene: Floats) -> Floats:
    return of_scene[:, None, None]


def _soft(distance: Floats) -> Floats:
    """Share of a pixel inside an edge, from the signed distance in pixels (negative inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _wave(phase: Floats) -> Floats:
    """Triangle wave of period 1 in [-1, 1]; its slope is 4."""
    return np.abs(phase - np.floor(phase) - 0.5) * 4 - 1


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


# Signed distances (negative inside, exact near the edge) of outlines in a circle of about unit radius, y upwards.


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(_length(x, y) - 1, 0.8 - _length(x - 0.5, y))


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(0.866 * np.abs(x) + 0.5 * y - 0.55, -0.55 - y)


def _star(x: Floats, y: Floats) -> Floats:
    """Five lines: a point is in the star when it is inside of at least four of them."""
    ax = np.abs(x)
    first, second = 0.951 * ax - 0.309 * y, 0.588 * ax + 0.809 * y
    third, fourth = 0.809 * y - 0.588 * ax, -y
    # On the right half the line through the left foot is never among the two largest.
    low, high = np.minimum(first, second), np.maximum(first, second)
    low2, high2 = np.minimum(third, fourth), np.maximum(third, fourth)
    return np.maximum(np.minimum(high, high2), np.maximum(low, low2)) - 0.36


def _heart(x: Floats, y: Floats) -> Floats:
    ax = np.abs(x)
    lobe = _length(ax - 0.42, y - 0.35) - 0.55
    point = 0.765 * ax - 0.644 * (y + 1)
    return np.minimum(lobe, np.maximum(point, y))


def _cross(x: Floats, y: Floats) -> Floats:
    ax, ay = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(ax, ay) - 0.33, np.maximum(ax, ay) - 1)


def _arrow(x: Floats, y: Floats) -> Floats:
    ax = np.abs(x)
    head = np.maximum((ax + 0.9 * (y - 1)) * 0.743, 0.05 - y)
    return np.minimum(head, np.maximum(ax - 0.3, np.abs(y + 0.4) - 0.6))


def _hourglass(x: Floats, y: Floats) -> Floats:
    ay = np.abs(y)
    return np.maximum(ay - 0.9, (np.abs(x) - 0.8 * ay - 0.1) * 0.78)


_OUTLINES: tuple[Callable[[Floats, Floats], Floats], ...] = (
    lambda x, y: _length(x, y) - 1,  # circle
    lambda x, y: np.abs(_length(x, y) - 0.75) - 0.27,  # ring
    _crescent,
    lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.82,  # square
    _triangle,
    lambda x, y: (np.abs(x) * 1.6 + np.abs(y) - 1.08) / 1.887,  # diamond
    _star,
    _heart,
    _cross,
    _arrow,
    _hourglass,
    lambda x, y: _length(np.maximum(np.abs(x) - 0.5, 0), y) - 0.5,  # pill
)


def _marks(texture: Ints, p: Floats, q: Floats, u: Floats, size: int) -> Floats:
    """[B, H, W] share of each pixel that is dark marking: stripes, dots or every second square; 0 where solid."""
    marks = np.zeros_like(p)
    for number, name in enumerate(TEXTURES[1:], start=1):
        these = np.flatnonzero(texture == number)
        period = {"striped": 0.125, "dotted": 0.125, "checked": 0.17}[name]
        a, b = p[these] / period + _col(u[these, 0]), q[these] / period + _col(u[these, 1])
        sharp = period * size  # pixels in a period
        if name == "striped":
            t = u[these, 2] * 2 - 1  # anything from one diagonal to the other
            marks[these] = _soft(_wave(_col(t) * a + _col(1 - np.abs(t)) * b) * sharp / 4)
        elif name == "dotted":
            a, b = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
            marks[these] = _soft((_length(a, b) - 0.3) * sharp)
        else:
            sides = [np.clip(_wave(c) * sharp / 2, -1, 1) for c in (a, b)]
            marks[these] = 0.5 + 0.5 * sides[0] * sides[1]
    return marks


def _ground(background: Ints, u: Floats, u_tint: Floats, x: Floats, y: Floats, size: int) -> Floats:
    """[B, 3, H, W] the backgrounds, each known by its colour and by its pattern."""
    pattern = np.empty((len(background), size, size), np.float32)
    for number, name in enumerate(BACKGROUNDS):
        these = np.flatnonzero(background == number)
        pattern[these] = _pattern(name, u[these], x, y)
    tint = ((u_tint - 0.5) * 0.16)[:, :, None, None]
    ground, mark = _GROUND_RGB[background].transpose(1, 0, 2)[..., None, None]
    return ground + tint + pattern[:, None] * (mark - ground)


def _pattern(name: str, u: Floats, x: Floats, y: Floats) -> Floats:
    """[B, H, W] strength in [0, 1] of a background's pattern."""
    u0, u1 = _col(u[:, 0]), _col(u[:, 1])
    if name == "grass":  # upright blades
        return 0.5 + 0.5 * _wave(x * 9 + _wave(y * 2 + u1) / 2 + u0) * _wave(y * 3 + x * 5 + u1)
    if name == "sand":  # slanted dunes
        return 0.5 + 0.5 * _wave((x + y) * 2 + _wave(x * 2 - y + u1) / 4 + u0)
    if name == "water":  # level waves
        return 0.5 + 0.5 * _wave(y * 6 + _wave(x * 2 + u1) / 4 + u0)
    if name == "brick":  # mortar lines; every second course is moved by half a brick
        course = y * 5 + u0
        odd = np.floor(course / 2) * 2 != np.floor(course)
        joint = x * 2.5 + u1 + odd.astype(np.float32) / 2
        return np.maximum(np.clip(_wave(course) * 4 - 3, 0, 1), np.clip(_wave(joint) * 8 - 7, 0, 1))
    count, core = (5, 0.32) if name == "snow" else (4, 0.16)  # flakes, dots
    a, b = x * count + y / 2 + u0, y * count - x / 2 + u1
    a, b = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
    return np.clip((core - _length(a, b)) * 8, 0, 1)


def _light(canvas: Floats, u: Floats, x: Floats, y: Floats) -> Floats:
    """The scene under its own light: from 0.75 to 1.15 times as bright, and up to 0.25 more or less at an edge."""
    level, across, down = (_col(u[:, i]) for i in range(3))
    light = 0.75 + 0.4 * level + (across - 0.5) * (x - 0.5) / 2 + (down - 0.5) * (y - 0.5) / 2
    return canvas * light[:, None]


def _noise(roots: NDArray[np.uint64], u_level: Floats, size: int) -> Floats:
    """[B, 3, H, W] uniform noise, in 8-bit steps; eight values come from each 64-bit number."""
    count = 3 * size * size
    raw = _hashes(roots, "noise", -(-count // 8)).astype("<u8").view(np.int8)[:, :count]
    level = (4 + 18 * u_level) / 128
    return (raw.astype(np.float32) * level[:, None]).reshape(-1, 3, size, size)


# Folders --------------------------------------------------------------------------------------------------------


def write_world(
    directory: Path,
    *,
    seed: int = 0,
    size: int = 32,
    num_train: int = 10_000,
    num_val: int = 1_000,
    num_test: int = 1_000,
    num_labelled: int = 30_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the world as tar shards: `{train,val,test}` with captions, `{objects,scenes}/{train,val,test}` labelled.

    `num_labelled` is the training size of each labelled set; their val and test sizes are those of the captioned
    ones. Labelled folders carry `classnames.txt` and `zeroshot_classification_templates.txt`. The folder appears
    whole or not at all: it is written beside its place and renamed, and a second call with equal arguments does
    nothing. A killed call leaves a hidden `.NAME.*.partial` folder, which may be deleted.
    `progress(done, total)` counts images.

    Raises DataError when the folder holds anything else, or cannot be written; UsageError for sizes below 1.
    """
    if size < 16 or min(num_train, num_val, num_test, num_labelled) < 1:
        raise UsageError(f"Size {size} px with {num_train}, {num_val}, {num_test} and {num_labelled} samples cannot be "
                         "written. Give a size of 16 or more and at least one sample for every set.")  # fmt: skip
    about: dict[str, Any] = {"world": "shapes", "version": VERSION, "seed": seed, "size": size}
    about |= {"num_train": num_train, "num_val": num_val, "num_test": num_test, "num_labelled": num_labelled}
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if _is_written(directory, about):
            return
        _write_sets(partial, about, progress)
        (partial / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(directory)
        except OSError:
            if not _is_written(directory, about):  # unless another process was first with the same world
                raise
    except OSError as error:
        raise DataError(
            f"The shapes world cannot be written to {directory}: {error.strerror or error}. "
            "Free some space there, or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_written(directory: Path, about: dict[str, Any]) -> bool:
    """Whether this very world stands there; DataError when anything else does."""
    try:
        found = json.loads((directory / "world.json").read_bytes())
    except FileNotFoundError:
        if not directory.exists() or not any(directory.iterdir()):
            return False
        found = None
    except ValueError:
        found = None
    if found == about:
        return True
    if not isinstance(found, dict) or found.get("world") != "shapes":
        raise DataError(f"{directory} holds other files and no shapes world. Give another folder.")
    other = {key: found.get(key) for key in about if found.get(key) != about[key]}
    said = "; ".join(f"{key} is {value!r}, asked is {about[key]!r}" for key, value in other.items())
    raise DataError(
        f"{directory} holds another shapes world ({said or 'with unknown keys'}). "
        "Give another folder, or delete this one."
    )


def _write_sets(root: Path, about: dict[str, Any], progress: Callable[[int, int], None] | None) -> None:
    from threetowers.data.shards import write_shards

    sets: list[tuple[Path, Kind, Split, int]] = []
    for kind in KINDS:
        for split in SPLITS:
            count = about["num_labelled" if kind != "pairs" and split == "train" else f"num_{split}"]
            sets.append((root / split if kind == "pairs" else root / kind / split, kind, split, count))
    total, done = sum(count for *_, count in sets), 0

    def told(samples: "Iterator[ShardSample]") -> "Iterator[ShardSample]":
        nonlocal done
        for sample in samples:
            yield sample
            done += 1
            if progress is not None and (done % 1_000 == 0 or done == total):
                progress(done, total)

    for folder, kind, split, count in sets:
        folder.mkdir(parents=True)
        write_shards(folder, told(_samples(about["seed"], count, kind, split, about["size"])))
        if kind != "pairs":
            _write_lines(folder / "classnames.txt", class_names(kind))
            _write_lines(
                folder / "zeroshot_classification_templates.txt",
                [text.replace("{}", "{c}") for text in templates()],
            )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _samples(seed: int, count: int, kind: Kind, split: Split, size: int) -> "Iterator[ShardSample]":
    from threetowers.data.shards import ShardSample

    for start in range(0, count, _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, count))
        images = render(seed, indices, kind=kind, size=size, split=split)
        texts = captions(seed, indices, split=split) if kind == "pairs" else [()] * len(indices)
        classes = [None] * len(indices) if kind == "pairs" else (indices % len(class_names(kind))).tolist()
        for index, image, caption, label in zip(indices, images, texts, classes, strict=True):
            with BytesIO() as file:
                # Stored, not compressed: noise would shrink by a fifth and take 1.7 times as long to read.
                Image.fromarray(image).save(file, "PNG", compress_level=0)
                yield ShardSample(f"{index:08d}", file.getvalue(), "png", caption, label)
