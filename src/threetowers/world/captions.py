"""True captions of the built-in world's scenes, in five wordings each."""

from threetowers.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIZES,
    SYNONYMS,
    TEXTURES,
    Ints,
    Split,
    scene_roots,
    scenes,
    uniform,
)

# {a} and {b} are the objects with their articles. {rel} is the position of a relative to b, {at} that of b to a.
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

LANES = 12
"""Uniform numbers for each caption: template, order, words of relation, spare, then four for each object."""


def captions(seed: int, indices: Ints, *, split: Split = "train") -> list[tuple[str, ...]]:
    """Five different captions of each `pairs` scene, all true, of 3 to 20 words without punctuation.

    The first caption is complete: both objects with size, texture, colour and shape, their relation and the
    background. The others leave some of that out. Right and left are as the viewer sees them.
    """
    content = scenes(seed, indices, split=split)
    roots = scene_roots(seed, indices, "pairs", split)
    draws = uniform(roots, "caption", 5 * LANES).reshape(-1, 5, LANES).tolist()
    columns = (
        content.background,
        content.layout,
        content.shape,
        content.colour,
        content.texture,
        content.size,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    result = []
    for (background, layout, *of_objects), draw in zip(rows, draws, strict=True):
        objects = list(zip(*of_objects, strict=True))[: 1 if layout == 0 else 2]
        result.append(five_texts(BACKGROUNDS[background], layout, objects, draw))
    return result


def five_texts(
    background: str, layout: int, objects: list[tuple[int, ...]], draws: list[list[float]]
) -> tuple[str, ...]:
    """The five captions of one scene; objects: left or upper one first. draws: [5][LANES] in [0, 1)."""
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
    """An object with its article, such as "a small striped red circle"; u in [0, 1)^4 chooses and omits words."""
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
