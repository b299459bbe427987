"""Draws the scenes of the built-in world.

Only operations that IEEE 754 requires to be rounded correctly are used (no sin, no exp), so that the bytes do not
depend on the batch, the processor or the NumPy version.

Shape suffixes: B scenes, H height, W width, S slots for objects (2).
"""

# NumPy's stubs type the results of its ufuncs as Any.
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from threetowers.errors import UsageError
from threetowers.world.scenes import (
    BACKGROUNDS,
    CHUNK,
    TEXTURES,
    Floats,
    Ints,
    Kind,
    Scenes,
    Split,
    hashes,
    scene_roots,
    scenes,
    uniform,
)

# fmt: off
_COLOUR_RGB: Floats = np.array([(.88, .10, .10), (.98, .52, .05), (.98, .90, .10), (.10, .68, .15),
                        (.10, .85, .88), (.10, .22, .92), (.52, .14, .74), (1., .52, .76)], np.float32)
# Ground and pattern colour of each background; muted, so that the objects stand out.
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
    roots = scene_roots(seed, indices, kind, split)
    content = scenes(seed, indices, kind=kind, split=split)
    images = np.empty((len(indices), size, size, 3), np.uint8)
    for start in range(0, len(indices), CHUNK):
        rows = slice(start, start + CHUNK)
        fields = (getattr(content, name)[rows] for name in Scenes.__slots__)
        images[rows] = _render_chunk(roots[rows], Scenes(*fields), size)
    return images


def _render_chunk(roots: NDArray[np.uint64], content: Scenes, size: int) -> NDArray[np.uint8]:
    names = ("radius", "place", "turn", "tint", "light", "phase", "texture_phase", "noise_level")
    u = {name: uniform(roots, name, 12).astype(np.float32) for name in names}
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, None, :]  # [1, 1, W]
    y = x.transpose(0, 2, 1)  # [1, H, 1], downwards
    canvas = _ground(content.background, u["phase"], u["tint"][:, 9:12], x, y, size)
    radius, centre_x, centre_y = _place(content, u["radius"], u["place"])
    for slot in range(2):
        rows = np.flatnonzero(content.shape[:, slot] >= 0)
        r = radius[rows, slot, None, None]
        t = (u["turn"][rows, slot] * 2 - 1) * _TURN
        cos, sin = _col((1 - t * t) / (1 + t * t)), _col(2 * t / (1 + t * t))
        right, up = x - centre_x[rows, slot, None, None], centre_y[rows, slot, None, None] - y
        p, q = right * cos + up * sin, up * cos - right * sin  # the object's own axes, in image sides
        cover = np.empty_like(p)
        for shape in np.unique(content.shape[rows, slot]):
            these = content.shape[rows, slot] == shape
            distance = _OUTLINES[shape](p[these] / r[these], q[these] / r[these]) * r[these]
            cover[these] = _soft(distance * size)
        marks = _marks(
            content.texture[rows, slot], p, q, u["texture_phase"][rows, 4 * slot : 4 * slot + 4], size
        )
        tint = u["tint"][rows, 3 * slot : 3 * slot + 3]
        colour = _COLOUR_RGB[content.colour[rows, slot]] + (tint - 0.5) * 0.14
        colour = colour[:, :, None, None] * (1 - 0.75 * marks)[:, None]
        canvas[rows] += cover[:, None] * (colour - canvas[rows])
    canvas = _light(canvas, u["light"], x, y) * 255 + _noise(roots, u["noise_level"][:, 0], size)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _place(content: Scenes, u_radius: Floats, u: Floats) -> tuple[Floats, Floats, Floats]:
    """Radius and centre [B, S] of every object, in image sides; two objects never touch or leave the picture."""
    low, high = np.array(_RADII, np.float32)[np.maximum(content.size, 0)].transpose(2, 0, 1)
    radius = low + (high - low) * u_radius[:, :2]
    r1, r2 = radius[:, 0], radius[:, 1]
    single, side = content.layout == 0, content.layout == 1
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
    raw = hashes(roots, "noise", -(-count // 8)).astype("<u8").view(np.int8)[:, :count]
    level = (4 + 18 * u_level) / 128
    return (raw.astype(np.float32) * level[:, None]).reshape(-1, 3, size, size)
